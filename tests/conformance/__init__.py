"""Check any LittleBit implementation against the laws of the method, with NumPy and Hypothesis alone.

    pytest --pyargs littlebit.conformance --backend my_module

A backend is a module with some of the functions of `littlebit.reference`; each law needs some of them. `Backend` calls
them with NumPy arrays. `laws` holds the laws, `exact` what they compare with, `golden` vectors for languages without
Python, and `examples` backends to begin from.
"""

import importlib

if __name__ != "littlebit.conformance":
    raise ImportError(
        f"this package is called littlebit.conformance, not {__name__}: install the project (pip install -e .) and "
        "import littlebit.conformance"
    )

EXPORTS = {"Backend": "backend", "Law": "law", "Outcome": "law", "check": "law", "LAWS": "laws"}


def __getattr__(name: str) -> object:
    """Import what is exported when it is first used: pytest loads this package in every run of any project."""
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{EXPORTS[name]}", __name__), name)
