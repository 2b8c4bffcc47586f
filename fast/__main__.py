"""Run the `littlebit` command: `python -m littlebit.fast`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
