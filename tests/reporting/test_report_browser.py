"""Pages of `quantkit report` in Chromium, if one is installed: no host is contacted, marks that are pointed at or
reached by keys show their words, dark mode and print have their colours, phones have room, and hostile text stays
text."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from reports import HOSTILE, coverage, evaluation, optimized, scored, sensitivity

from quantkit.cli import cli
from quantkit.planning.plan import Plan

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")
WIDE, PHONE = 1400, 400
TITLE = "Types of deepseek-r1 as UD-IQ1_S, by layer"


class Watched:
    """A page that records its messages and requests."""

    def __init__(self, browser: Browser, path: Path, width: int = WIDE, dark: bool = False) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
        )
        self.page: Page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda m: self.said.append(m.text))
        self.page.on("pageerror", lambda e: self.said.append(str(e)))
        self.page.on("dialog", lambda d: self.said.append(d.message))
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.goto(path.as_uri())
        self.path = path

    def close(self) -> None:
        self.context.close()
        assert self.said == []
        assert [url for url in self.asked if not url.startswith("data:")] == [self.path.as_uri()]

    def colour(self, selector: str, what: str = "fill") -> str:
        """A colour as the browser computes it."""
        found = self.page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{what}")
        assert isinstance(found, str)
        return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as p:
        args = ["--no-sandbox"] if os.geteuid() == 0 else []
        made = p.chromium.launch(executable_path=CHROMIUM, args=args)
        yield made
        made.close()


@pytest.fixture(scope="module")
def r1(r1_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of all kinds of figures, with R1's 1,086 tensors and as many experts as R1 has."""
    folder = tmp_path_factory.mktemp("page")
    names = {"routed expert": [f"blk.{i}.ffn_down_exps.weight" for i in range(3, 61)], "output": ["output.weight"]}
    documents = {
        "plan": r1_plan.to_json(None), "coverage": coverage(58, 256), "sensitivity": sensitivity(names),
        "eval": evaluation(*(scored(f"c{i}", (i + 1) << 30, 0.5 / (i + 1)) for i in range(5))),
        "optimized": optimized(),
    }  # fmt: skip
    for name, said in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(said))
    files = [str(folder / f"{name}.json") for name in documents]
    cli.main(["report", *files, "-q", "-o", str(folder / "r.html"), "--fit", "2x80"], standalone_mode=False)
    return folder / "r.html"


@pytest.fixture(scope="module")
def r1_plan() -> Plan:
    from quantkit import load_recipe, open_model, plan

    return plan(open_model("deepseek-r1"), load_recipe("UD-IQ1_S"))


@pytest.fixture
def wide(browser: Browser, r1: Path) -> Iterator[Watched]:
    made = Watched(browser, r1)
    yield made
    made.close()


def test_all_is_there(wide: Watched, r1: Path) -> None:
    assert r1.stat().st_size < 3_000_000
    assert wide.page.locator("figure").count() == 10
    assert wide.page.locator("figure details table").count() == 10
    layers = wide.page.locator("figure", has_text=TITLE)
    assert layers.locator("tbody tr").count() == 1086
    assert layers.locator(".chart svg .role-mark.mark-rect > path").count() == 1086
    for f in wide.page.locator("figure").all():
        seen = f.locator(".chart svg").evaluate_all("all => all.filter(s => s.getClientRects().length).length")
        assert seen == 1
        svg = f.locator(".chart svg").first
        assert svg.locator("[aria-label], [role]").count() > 0
    assert not wide.page.locator("#tip").is_visible()


def test_pointing_at_a_tensor_shows_its_rule(wide: Watched, r1_plan: Plan) -> None:
    name = "blk.3.ffn_down_exps.weight"
    t = r1_plan[name]
    mark = wide.page.locator(f'.chart.layers path[aria-label^="{name}\\a "]')
    mark.scroll_into_view_if_needed()
    wide.page.wait_for_timeout(200)  # for the scroll event, which hides the tooltip
    mark.hover()
    tip = wide.page.locator("#tip")
    tip.wait_for(state="visible")
    counts = coverage(58, 256)["tensors"][0]["counts"]
    assert tip.inner_text().split("\n") == [
        name, f"{t.type}, {t.nbytes:,} bytes, routed expert", f"rule: {t.rule}", f"why: {t.why}",
        "importance matrix: required", f"tokens seen: {min(counts)} to {max(counts):,}",
    ]  # fmt: skip
    box = tip.bounding_box()
    assert box is not None
    assert 0 <= box["x"] <= WIDE - box["width"]
    wide.page.mouse.move(2, 2)
    assert not tip.is_visible()


def test_pointing_at_an_expert_shows_its_tokens(wide: Watched) -> None:
    cells = wide.page.locator(".chart.coverage svg .role-mark.mark-rect > path")
    assert cells.count() == 58 * 256
    cells.nth(1).hover(force=True)
    assert wide.page.locator("#tip").inner_text() == "layer 3, expert 1\n0 tokens"
    assert wide.colour(".chart.coverage .role-mark.mark-rect > path:nth-child(2)") == "rgb(207, 34, 46)"
    cells.nth(256 + 5).hover(force=True)
    n = coverage(2, 256)["tensors"][1]["counts"][5]
    assert wide.page.locator("#tip").inner_text() == f"layer 4, expert 5\n{n:,} tokens"


def test_keys_go_from_mark_to_mark(wide: Watched) -> None:
    chart = wide.page.locator(".chart.layers")
    chart.focus()
    said, tip = wide.page.locator("#said"), wide.page.locator("#tip")
    wide.page.keyboard.press("Home")
    first = said.text_content() or ""
    assert first.startswith("output.weight")
    wide.page.keyboard.press("ArrowRight")
    second = said.text_content() or ""
    assert second != first
    assert tip.inner_text() == second
    wide.page.keyboard.press("End")
    assert (said.text_content() or "").split("\n")[0] == "blk.60.ffn_up_shexp.weight"
    wide.page.keyboard.press("ArrowLeft")
    assert (said.text_content() or "").split("\n")[0] == "blk.59.ffn_up_shexp.weight"
    wide.page.keyboard.press("ArrowUp")
    assert (said.text_content() or "").split("\n")[0] == "blk.59.ffn_gate_shexp.weight"
    tip.wait_for(state="visible")
    wide.page.keyboard.press("Escape")
    assert not tip.is_visible()
    # and a key opens the table
    summary = wide.page.locator("figure", has_text=TITLE).locator("summary")
    summary.focus()
    wide.page.keyboard.press("Enter")
    assert wide.page.locator("figure", has_text=TITLE).locator("table").is_visible()


def colours(page: Watched) -> dict[str, str]:
    of = {
        "page": page.colour("body", "backgroundColor"), "text": page.colour("h1", "color"),
        "words in charts": page.colour(".chart.layers .role-axis-label text"),
        "a type": page.colour('.chart.layers path[aria-label^="blk.3.ffn_gate_exps.weight"]'),
        "bars": page.colour(".chart.ladder .role-mark.mark-rect path"),
    }  # fmt: skip
    assert all(of.values()), of
    return of


def test_dark_mode_changes_all_colours_and_print_has_the_light_ones(browser: Browser, r1: Path, wide: Watched) -> None:
    dark = Watched(browser, r1, dark=True)
    light = colours(wide)
    there = colours(dark)
    assert {what for what in light if light[what] == there[what]} == set()
    assert (light["page"], there["page"]) == ("rgb(255, 255, 255)", "rgb(20, 23, 28)")
    dark.page.emulate_media(media="print")
    assert colours(dark) == light
    assert not dark.page.locator("summary").first.is_visible()
    dark.close()


def test_a_phone_has_room(browser: Browser, r1: Path) -> None:
    phone = Watched(browser, r1, PHONE)
    assert phone.page.evaluate("document.documentElement.scrollWidth") == PHONE
    for f in phone.page.locator("figure").all():
        seen = f.locator(".chart svg").evaluate_all("all => all.filter(s => s.getClientRects().length).length")
        assert seen == 1
        box = f.bounding_box()
        assert box is not None
        assert box["x"] + box["width"] <= PHONE
    for kind in ("bytes", "ladder", "front", "predicted", "shares"):
        chart = phone.page.locator(f".chart.{kind}").first
        assert chart.evaluate("e => e.scrollWidth <= e.clientWidth"), kind
    assert phone.page.locator(".chart.layers").evaluate("e => e.scrollWidth > e.clientWidth")
    cell = phone.page.locator('.chart.bytes .narrow path[aria-label^="blk.3.ffn_down_exps.weight"]')
    cell.click()
    assert phone.page.locator("#tip").inner_text().startswith("blk.3.ffn_down_exps.weight\n")
    phone.close()


def test_hostile_text_does_nothing(browser: Browser, r1_plan: Plan, tmp_path: Path) -> None:
    said = r1_plan.to_json(None)
    for i, t in enumerate(said["tensors"]):
        bad = HOSTILE[i % len(HOSTILE)]
        t.update(name=f"blk.{i % 7}.{bad}{i}", role=f"{bad}", type=f"{bad}", rule=bad, why=bad)
    said["model"] = said["recipe"] = "".join(HOSTILE)
    (tmp_path / "p.json").write_text(json.dumps(said))
    matrix = coverage(2, 4, tuple(f"{bad}_exps" for bad in HOSTILE))
    (tmp_path / "i.json").write_text(json.dumps(matrix))
    out = tmp_path / "r.html"
    cli.main(
        ["report", str(tmp_path / "p.json"), str(tmp_path / "i.json"), "-q", "-o", str(out)], standalone_mode=False
    )
    page = Watched(browser, out)
    for chart in page.page.locator(".chart").all():
        chart.focus()
        page.page.keyboard.press("Home")
        page.page.keyboard.press("ArrowRight")
        assert page.page.locator("#tip").is_visible()
    assert page.page.evaluate("window.pwned") is None
    assert page.page.locator("img, iframe, object").count() == 0
    assert page.page.locator("script:not([type])").count() == 1
    page.close()


def test_a_script_that_got_in_would_not_run(browser: Browser, r1: Path, tmp_path: Path) -> None:
    """Tests the page's policy with a page that a script did get into."""
    text = r1.read_text("utf-8").replace(
        "<main>", '<main><script>window.pwned=1</script><img src="http://127.0.0.1:9/">'
    )
    (tmp_path / "r.html").write_text(text)
    page = Watched(browser, tmp_path / "r.html")
    assert page.page.evaluate("window.pwned") is None
    page.context.close()
    assert len(page.said) == 2
    assert all("Content Security Policy" in line for line in page.said)
