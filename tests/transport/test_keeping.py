"""Memory of what is on its way."""

from __future__ import annotations

import weakref

import pytest
import torch

from xdit_ir.transport.keeping import keeping


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.bool, torch.float8_e4m3fn])
def test_a_token_keeps_the_memory_of_a_tensor_that_nobody_else_has(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 5).to(dtype)
    alive = weakref.ref(x.untyped_storage())
    token = keeping(x)
    assert token.numel() == 0 and token.untyped_storage().data_ptr() == x.data_ptr()
    assert token.untyped_storage()._cdata != x.untyped_storage()._cdata, "no view: an operator may return it"
    del x
    assert alive() is not None
    del token
    assert alive() is None
