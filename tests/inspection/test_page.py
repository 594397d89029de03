"""The page as a person uses it, in headless Chromium. Needs `pip install playwright` and a Chromium on the path."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import xdit_ir as xir
from xdit_ir import models
from xdit_ir.inspection import WRITERS, inspect

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on the path: apt-get install chromium")
QUIET = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")
SECONDS = 2.0  # in which the page of a full-size model is there


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1-dev, full size, on 2 x 2 ranks."""
    model, example = models.load("flux.1-dev", device="meta", dtype=torch.bfloat16)
    path = tmp_path_factory.mktemp("page") / "flux.html"
    path.write_text(WRITERS["html"](inspect(xir.trace(model, example), "flux.1-dev", ulysses=2, ring=2)))
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny one in two stages."""
    path = tmp_path_factory.mktemp("page") / "tiny.html"
    traced = xir.trace(*models.load("flux.1-dev:tiny"))
    path.write_text(WRITERS["html"](inspect(traced, "flux.1-dev:tiny", pipefusion=2)))
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=BROWSER, args=list(QUIET))
        yield started
        started.close()


class Visit:
    """A page that is open; `problems` are console errors, exceptions, and requests that leave the file."""

    def __init__(self, browser: Any, path: Path, width: int, scheme: str) -> None:
        self.problems: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.page.on("console", lambda said: self.problems.append(said.text) if said.type != "log" else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda one: self.problems.append(one.url) if one.url != path.as_uri() else None)
        begin = time.perf_counter()
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]")
        self.seconds = time.perf_counter() - begin

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def overflow(self) -> int:
        return int(self.page.evaluate("document.documentElement.scrollWidth - innerWidth"))


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_a_person_looks_around(browser: Any, flux: Path, width: int, scheme: str) -> None:
    visit = Visit(browser, flux, width, scheme)
    page = visit.page
    assert visit.overflow() <= 0, "the page is wider than the window"
    assert page.evaluate("document.documentElement.dataset.theme") == scheme

    page.click('.box.call:has-text("FluxSingleTransformerBlock × 38")')
    body = visit.text("#panel")
    assert "%attention: bf16" in body and "ring_attention(" in body and "all_to_all over ulysses" in body
    assert "4096/(ring*ulysses)" in body and "attention_dispatch.py" in body
    page.click("#panel .subtabs button:has-text('before and after')")
    assert "scaled_dot_product_attention(" in visit.text("#panel table.diff")

    page.fill("#search", "single_transformer_blocks.7")
    page.keyboard.press("Enter")
    assert visit.text("#panel h2") == "single_transformer_blocks.7"
    page.fill("#search", "ring_attention")
    page.keyboard.press("Enter")
    assert "ring_attention(" in visit.text("#panel .value.here")
    page.fill("#search", "no such thing")
    assert visit.text("#found") == "nothing found"
    page.keyboard.press("Escape")

    page.click("#to-passes")
    assert "4096/(ring*ulysses)" in visit.text("#pass-view")
    page.click("#pass-list li:has-text('lower-attention')")
    assert "= ring_attention(" in visit.text("#pass-view table.diff")
    page.click("#to-report")
    assert "228" in visit.text("#tab-report table") and "attention_dispatch.py" in visit.text("#tab-report")
    page.click("#to-timeline")
    painted = "c => { const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; return d.some(v => v) }"
    assert page.eval_on_selector("#timeline canvas", painted)
    assert visit.overflow() <= 0
    assert visit.problems == []
    page.close()


def test_it_opens_at_once(browser: Any, flux: Path) -> None:
    """The best of some visits: this process shares its cores with other tests."""
    assert min(Visit(browser, flux, 1280, "light").seconds for _ in range(4)) < SECONDS


def test_layers_unfold_and_stages_have_colours(browser: Any, tiny: Path) -> None:
    visit = Visit(browser, tiny, 1280, "light")
    page = visit.page
    fills = "boxes => new Set(boxes.map(b => getComputedStyle(b.querySelector('.body')).fill)).size"
    assert page.eval_on_selector_all(".box.call.staged", fills) == 2
    page.click("#sides button:has-text('before')")
    folded = page.locator(".box.call").count()
    page.click("#expand")
    assert (folded, page.locator(".box.call").count()) == (2, 4)
    page.click("#to-timeline")
    page.click("#zoom-in")
    page.mouse.move(400, 240)
    assert visit.problems == []
    page.close()


def test_a_program_alone_has_a_page_too(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "alone.html"
    path.write_text(
        WRITERS["html"](inspect(xir.trace(torch.nn.Linear(4, 4), (torch.ones(2, 4),)), "a <script> & more"))
    )
    visit = Visit(browser, path, 1280, "light")
    assert "a <script> & more" in visit.text("#subtitle")
    assert visit.page.locator(".box").count() == 3
    for tab in ("passes", "report", "graph"):
        visit.page.click(f"#to-{tab}")
    visit.page.click(".box.operators")
    assert "linear(" in visit.text("#panel")
    assert visit.problems == []
    visit.page.close()
