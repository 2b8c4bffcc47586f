"""Copy the notebooks of the installed version into a folder: python -m littlebit.notebooks FOLDER."""

import argparse
import shutil
from pathlib import Path


def main() -> None:
    """Copy every notebook that is not there yet; no file is overwritten."""
    parser = argparse.ArgumentParser(prog="python -m littlebit.notebooks", description=__doc__)
    parser.add_argument("folder", type=Path, help="made if it does not exist")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    for source in sorted([*here.glob("*.ipynb"), here / "littlebit_from_zero.py"]):
        target = folder / source.name
        if target.exists():
            print(f"{target} is there already: left alone")
        else:
            shutil.copyfile(source, target)
            print(target)


if __name__ == "__main__":
    main()
