"""Execute the notebooks and the code in their answers, and keep the outputs for the book: make notebooks.

All of them or, with numbers as arguments, some. The files stay as they are, without outputs; the book takes the outputs
from the cache, which knows a notebook by its code.
"""

import argparse
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

HERE = Path(__file__).parent
CACHE = HERE.parent / "build" / "notebook-cache"
CELL_SECONDS = 600
ANSWER = re.compile(r"<details>(.*?)</details>", re.DOTALL)
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def answers(notebook: nbformat.NotebookNode) -> list[str]:
    """Extract the Python code from the folded answers."""
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return [code for text in prose for answer in ANSWER.findall(text) for code in FENCE.findall(answer)]


def execute(path: Path) -> CacheBundleIn:
    """Execute a notebook, time it, and run its answers as further cells.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        If a cell or an answer fails; it says which.
    """
    notebook = nbformat.read(path, as_version=4)
    cells, begin = list(notebook.cells), time.perf_counter()
    notebook.cells = cells + [new_code_cell(code) for code in answers(notebook)]
    options = {"timeout": CELL_SECONDS, "resources": {"metadata": {"path": str(path.parent)}}}
    try:
        # record_timing writes into the cells' metadata, by which the cache knows a notebook, too
        NotebookClient(notebook, record_timing=False, **options).execute()
    except Exception as error:
        error.add_note(f"in {path.name}")
        raise
    notebook.cells = cells
    seconds = time.perf_counter() - begin
    print(f"{seconds:6.1f} s  {path.name}", flush=True)
    return CacheBundleIn(notebook, str(path), data={"execution_seconds": seconds})


def main() -> None:
    """Execute as many notebooks at once as there are processors, each on one core."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", default=[""], help="such as 03: only the notebooks that begin with it")
    chosen = parser.parse_args().numbers
    paths = sorted(path for path in HERE.glob("*.ipynb") if path.name.startswith(tuple(chosen)))
    os.environ["OMP_NUM_THREADS"] = "1"
    cache = get_cache(CACHE)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for bundle in pool.map(execute, paths):
            cache.cache_notebook_bundle(bundle, overwrite=True)


if __name__ == "__main__":
    main()
