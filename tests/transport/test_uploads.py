"""Memory of the host for weights: pages of their own, given back behind the last tensor that uses them."""

from __future__ import annotations

from xdit_ir.transport.uploads import own_pages


def test_pages_live_as_long_as_any_tensor_in_them() -> None:
    ended: list[int] = []
    pages = own_pages(10_000, ended.append)
    address, part = pages.data_ptr(), pages.view(100, 100)[3]
    assert address % 4096 == 0 and not pages.any()
    pages[300:400] = 7
    del pages
    assert not ended and (part == 7).all()
    del part
    assert ended == [address]
