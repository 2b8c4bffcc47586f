"""A package that imports its modules when they are needed: what a light process never asks for costs it nothing.

    if TYPE_CHECKING:
        from .svd import svd as svd
    make_lazy(__name__, {"svd": "svd"})

The imports are for readers, editors and type checkers; at run time the first look at a name (PEP 562) imports its
module.
"""

import ast
import importlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any


class LazyPackage(ModuleType):
    """A package whose public names are imported when they are first asked for."""

    exports: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        if name not in self.exports:
            from ..reference._renamed import renamed_attribute  # imports NumPy, so only where it is needed

            return renamed_attribute(self.__name__, name)
        value = getattr(importlib.import_module(f"{self.__name__}.{self.exports[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; where Python sets a module that was imported, a function of the same name goes first."""
        if isinstance(value, ModuleType) and self.exports.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.exports})


def exports_of(source: str) -> dict[str, str]:
    """The module of each name that an `__init__` imports as itself, from its source.

    Examples
    --------
    >>> exports_of("from .svd import rank_one as rank_one, svd as svd")
    {'rank_one': 'svd', 'svd': 'svd'}
    """
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return {each.name: str(node.module) for node in imports for each in node.names if each.asname == each.name}


def make_lazy(package: str, exports: Mapping[str, str]) -> None:
    """Turn an imported package into a lazy one that exports these names, each from the module that is given."""
    module: Any = sys.modules[package]
    module.exports = exports
    module.__all__ = list(exports)  # for `from package import *`
    module.__class__ = LazyPackage
