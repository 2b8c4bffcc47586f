"""Open the built book in a browser and report what is wrong: needs Chromium and `pip install playwright`.

    python book/_ext/check.py build/book [--screenshots FOLDER]

Every page is opened at the width of a desk, and chapters also at that of a phone, with light and dark colours. Reported
are errors on the console, files that do not load, pictures and equations that cannot be seen, and pages wider than the
screen; the interactive pages must react to their controls, and the search must find something.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
VIEWS = {  # width, height, colours
    "desk-light": (1280, 900, "light"),
    "desk-dark": (1280, 900, "dark"),
    "phone-light": (390, 844, "light"),
    "phone-dark": (390, 844, "dark"),
}
ABORTED = "net::ERR_ABORTED"  # by going on to the next page
UNSEEN = """() => {
    const wrong = [];
    for (const image of document.images) {
        const shown = getComputedStyle(image).display !== 'none';
        if (shown && !(image.complete && image.naturalWidth)) wrong.push('picture ' + image.src);
        if (shown && !image.alt && !image.closest('a')) wrong.push('picture without words ' + image.src);
    }
    for (const math of document.querySelectorAll('.math')) {
        const made = math.querySelector('mjx-container');
        if (!made || !made.getBoundingClientRect().width) wrong.push('equation ' + math.textContent.slice(0, 60));
    }
    for (const error of document.querySelectorAll('mjx-merror')) wrong.push('equation ' + error.textContent);
    const over = document.documentElement.scrollWidth - window.innerWidth;
    if (over > 1) wrong.push(`page is ${over} pixels wider than the screen`);
    return wrong;
}"""
STATE = """() => ({
    matrix: document.getElementById('explore-picture').toDataURL(),
    error: document.getElementById('explore-caption').textContent,
    perplexity: document.getElementById('explore-perplexity').textContent,
    memory: document.getElementById('explore-memory').textContent,
})"""
PLAYED = """() => Object.fromEntries(['rotation-cloud', 'latent-path', 'latent-reach', 'kinds-energy',
    'kinds-error', 'kinds-errors'].map((id) => [id, document.getElementById(id).innerHTML]))"""


def browser_path() -> str | None:
    """Find Chromium on the search path."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Any]:
    """Open Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()


def visited(opened: Any, paths: list[Path], view: str, found: list[str]) -> Iterator[tuple[Path, Any]]:
    """Visit each page in a view, and add the errors that the browser reports to `found`."""
    width, height, colours = VIEWS[view]
    page = opened.new_page(viewport={"width": width, "height": height}, color_scheme=colours)

    def report(what: str) -> None:
        found.append(f"{Path(page.url).name} ({view}): {what}")

    page.on("console", lambda message: message.type == "error" and report(f"console: {message.text}"))
    page.on("pageerror", lambda error: report(f"script: {error}"))
    page.on("requestfailed", lambda request: request.failure != ABORTED and report(f"not loaded: {request.url}"))
    for path in paths:
        page.goto(path.resolve().as_uri())
        page.evaluate("() => window.MathJax && MathJax.startup && MathJax.startup.promise")
        page.evaluate("() => document.fonts.ready.then(() => null)")
        for wrong in page.evaluate(UNSEEN):
            report(wrong)
        yield path, page
    page.close()


def problems(folder: Path, screenshots: Path | None = None) -> list[str]:
    """List what is wrong with the built pages."""
    found: list[str] = []
    everything = sorted(folder.rglob("*.html"))
    with browser() as opened:
        for view in VIEWS:
            paths = [path for path in everything if path.parent == folder or view == "desk-light"]
            for path, page in visited(opened, paths, view, found):
                if path.name == "explore.html":
                    found += [f"{path.name} ({view}): {wrong}" for wrong in unmoved(page)]
                if path.name == "play.html":
                    found += [f"{path.name} ({view}): {wrong}" for wrong in unplayed(page)]
                if path.name == "search.html":
                    found += [f"{path.name} ({view}): {wrong}" for wrong in unfound(page)]
                if screenshots and path.parent == folder:
                    screenshots.mkdir(parents=True, exist_ok=True)
                    page.screenshot(path=screenshots / f"{path.stem}-{view}.png", full_page=True)
    return found


def unmoved(page: Any) -> list[str]:
    """List the parts of the interactive page that do not follow its slider (moved by the keyboard) and its buttons."""
    before = page.evaluate(STATE)
    page.focus("#explore-bits")
    page.keyboard.press("ArrowLeft")
    after = page.evaluate(STATE)
    wrong = [f"{part} does not follow the slider" for part in before if before[part] == after[part]]
    page.check("input[value=dual-svid]")
    page.check("input[name=explore-table][value='4']")
    last = page.evaluate(STATE)
    changed = {part for part in after if after[part] != last[part]}
    if changed != {"matrix", "error", "memory"}:
        wrong.append(f"the buttons change {sorted(changed)}")
    return wrong


def unplayed(page: Any) -> list[str]:
    """List the parts of the page to play with that do not follow their sliders (moved by the keyboard) and buttons."""
    before = page.evaluate(PLAYED)
    for slider in ("#rotation-angle", "#latent-start"):
        page.focus(slider)
        page.keyboard.press("ArrowRight")
    page.check("input[name=kinds-layer][value=up_proj]")
    after = page.evaluate(PLAYED)
    return [f"{part} does not follow its control" for part in before if before[part] == after[part]]


def unfound(page: Any) -> list[str]:
    """Check that the search finds a page for a common word."""
    from playwright.sync_api import TimeoutError as NothingCame

    page.goto(f"{page.url}?q=residual")
    try:
        page.wait_for_selector("#search-results li", timeout=10_000)
    except NothingCame:
        return ["the search finds nothing"]
    return []


def main() -> None:
    """Check a built book."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--screenshots", type=Path)
    arguments = parser.parse_args()
    found = problems(arguments.folder, arguments.screenshots)
    print("\n".join(found) or "nothing is wrong")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
