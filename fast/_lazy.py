"""Import a package's modules on first use, so that `import littlebit.fast` loads no library.

PEP 562 lets a package answer for attributes that it does not have yet. `make_lazy` gives it a table of what it exports:

    make_lazy(__name__, {"svd": "rank_one svd truncated_svd", "packing": "pack_signs unpack_signs"})

The first look at `package.rank_one` then imports `package.svd`. The table is data: nothing reads the source, so a
package of .pyc files works too. Editors and type checkers do not see the table. For them the package repeats its
exports as imports under `if TYPE_CHECKING:`, and a test compares the two.
"""

import importlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any


class LazyPackage(ModuleType):
    """Import the module behind a public name when the name is first looked up."""

    exports: Mapping[str, str]  # name -> module that defines it

    def __getattr__(self, name: str) -> Any:
        if name not in self.exports:
            from ..reference._renamed import renamed_attribute  # late, because it imports NumPy

            return renamed_attribute(self.__name__, name)
        value = getattr(importlib.import_module(f"{self.__name__}.{self.exports[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; keep a function that has the name of its module, such as `svd`.

        After importing `package.svd` Python sets `package.svd` to the module. The export is the function in it.
        """
        if isinstance(value, ModuleType) and self.exports.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.exports})


def make_lazy(package: str, names_by_module: Mapping[str, str]) -> None:
    """Make an imported package load its exports on first use.

    Parameters
    ----------
    package : str
        Full name of the package, which is being imported or has been.
    names_by_module : mapping of str to str
        For each module, relative to the package, the names that it exports, separated by spaces.
    """
    module: Any = sys.modules[package]
    module.exports = {name: source for source, names in names_by_module.items() for name in names.split()}
    module.__all__ = list(module.exports)  # for `from package import *`
    module.__class__ = LazyPackage
