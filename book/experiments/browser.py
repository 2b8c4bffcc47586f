"""Measure the model that writes in the browser: its speed in Chromium, and whether its tokens are the package's.

    make book
    python book/experiments/browser.py book/results/browser.json

Needs Chromium and the extra [browser]. Every shipped width writes 64 greedy tokens after each prompt. Two speeds are
recorded: the page's own, by the clock, and tokens for each second of processor time of the page's process, which
includes reading the prompt, and which other programs change less.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import littlebit.fast as lb
from littlebit.fast.bench.timing import cpu_name, save_results

BOOK = Path(__file__).resolve().parents[1]
sys.path.append(str(BOOK / "_ext"))

from browser_model import NAMES  # noqa: E402 (the path comes first)
from check import browser  # noqa: E402

PROMPTS = ("The history of the city begins", "Once upon a time", "Water boils when")
TOKENS = 64
MINUTES = 10 * 60_000  # milliseconds that a text may take


def processor_seconds(session: Any) -> float:
    """Add up the processor time that the browser's pages have taken."""
    found = session.send("SystemInfo.getProcessInfo")["processInfo"]
    return sum(each["cpuTime"] for each in found if each["type"] == "renderer")


def text_of_page(page: Any, session: Any, name: str, prompt: str) -> tuple[str, float, float]:
    """Let the page write, and return its text, and its tokens a second of the clock and of processor time."""
    if page.locator("#write-app").get_attribute("data-model") != name:
        written_by_page(page, name, prompt, 1)  # reads the model
    before = processor_seconds(session)
    written, text, rate = written_by_page(page, name, prompt, TOKENS)
    return text, rate, len(written) / (processor_seconds(session) - before)


def written_by_page(page: Any, name: str, prompt: str, count: int) -> tuple[list[int], str, float]:
    """Let the page write `count` greedy tokens; return them, their text, and their number a second."""
    page.select_option("#write-model", name)
    page.select_option("#write-temperature", "0")
    page.fill("#write-length", str(count))
    page.fill("#write-prompt", prompt)
    page.click("#write-button")
    page.wait_for_selector("#write-status[data-tokens]", state="attached", timeout=MINUTES)
    status = page.locator("#write-status")
    written = json.loads(status.get_attribute("data-tokens"))
    assert written, status.text_content()
    return written, page.locator("#write-answer").text_content(), float(status.get_attribute("data-rate"))


def main() -> None:
    """Measure every width and save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pages", type=Path, default=BOOK.parent / "build" / "book")
    parser.add_argument("--names", nargs="+", default=list(NAMES))
    arguments, rows = parser.parse_args(), []
    with browser() as opened:
        page, session = opened.new_page(), opened.new_browser_cdp_session()
        page.goto((arguments.pages / "write.html").resolve().as_uri())
        for name in arguments.names:
            model = lb.load(name)
            wanted = [lb.generate(model, prompt, max_new_tokens=TOKENS, temperature=0.0) for prompt in PROMPTS]
            found = [text_of_page(page, session, name, prompt) for prompt in PROMPTS]
            row = {"name": name, "tokens": TOKENS, "prompts": len(PROMPTS), "browser": f"Chromium {opened.version}"}
            row["same_texts"] = sum(text == mine for (text, *_), mine in zip(found, wanted, strict=True))
            row["tokens_per_s"] = statistics.median(rate for _, rate, _ in found)
            row["tokens_per_processor_s"] = statistics.median(rate for *_, rate in found)
            rows.append(row)
            print(row, flush=True)
            command = "python book/experiments/browser.py book/results/browser.json"
            save_results(arguments.out, rows, command, cpu_name())


if __name__ == "__main__":
    main()
