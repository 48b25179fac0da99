"""How large a page of `quantkit report` is, and how long it takes to make and to open: bytes, seconds of the clock
and of the processor.

    python benchmarks/report.py [SOURCE ...] [--recipe R ...] [--rounds N] [--figures]

Without a SOURCE it is deepseek-r1 with UD-IQ1_S, R1's 1,086 tensors. The command runs as a process of its own, so its
imports count. With a Chromium and playwright the page is opened in it, and what it asks for is counted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path


def run(words: list[str]) -> tuple[float, float]:
    """Seconds, and processor seconds, of a command."""
    start = time.perf_counter()
    child = os.posix_spawn(words[0], words, os.environ)
    _, status, usage = os.wait4(child, 0)
    assert status == 0, words
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def opened(page: Path) -> tuple[float, int, int]:
    """Seconds until a page is loaded, marks with words, and requests but for itself. (0, 0, 0) without a browser."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        return 0.0, 0, 0
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        tab = browser.new_page()
        asked: list[str] = []
        tab.on("request", lambda r: asked.append(r.url))
        start = time.perf_counter()
        tab.goto(page.as_uri())
        seconds = time.perf_counter() - start
        marks = tab.locator("svg .role-mark [aria-label]").count()
        browser.close()
    return seconds, marks, len([url for url in asked if not url.startswith("data:")]) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", default=[])
    parser.add_argument("-r", "--recipe", action="append", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--figures", action="store_true", help="With SVG and PNG of each figure.")
    given = parser.parse_args()
    sources = given.sources or ["deepseek-r1"]
    recipes = given.recipe or ([] if given.sources else ["UD-IQ1_S"])
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "r.html")
        words = [sys.executable, "-m", "quantkit", "report", *sources, "-o", str(page), "--force", "-q"]
        words += [word for recipe in recipes for word in ("-r", recipe)]
        words += ["--figures", str(Path(folder, "figures"))] if given.figures else []
        times = sorted(run(words) for _ in range(given.rounds))
        opening, marks, asked = opened(page)
        print("| what | figure |\n|---|---|")
        of = ", ".join(sources) + (f" as {', '.join(recipes)}" if recipes else "")
        print(f"| page of {of} | {page.stat().st_size:,} bytes |")
        print(f"| made in, the least of {given.rounds} runs | {times[0][0]:.2f} s |")
        print(f"| processor, the least | {min(cpu for _, cpu in times):.2f} s |")
        if marks:
            print(f"| opened in Chromium in | {opening:.2f} s |")
            print(f"| marks with words | {marks:,} |")
            print(f"| requests | {asked} |")


if __name__ == "__main__":
    main()
