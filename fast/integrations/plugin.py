"""Tells torch, transformers and PEFT about LittleBit as soon as they are imported, and never imports them.

These libraries have lists to register with, but no entry points that would make them look for others. So `Watcher`
stands in `sys.meta_path`. It finds no module itself: it hands on what the other finders find, with one step more at
the end of three modules. It never changes a loader, which may serve other modules, and it stays where it is. So it does
not matter who asks for a module first, whether an import fails at first, or whether a module is reloaded. Where another
finder comes first and the step is lost, the next import of any module makes up for it.
"""

import importlib
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from copy import copy
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)

#: The modules in which the libraries keep what is to be extended, and our modules that have a `register` for them
REGISTERS = {
    "torch": "..kernels.torch_op",
    "transformers.quantizers.auto": ".hf_quantizer",
    "peft.tuners.lora.model": ".peft_lora",
}


def announce() -> None:
    """Register LittleBit with the libraries: now if they are imported already, else when they are."""
    sys.meta_path[:] = [WATCHER, *(finder for finder in sys.meta_path if finder is not WATCHER)]
    WATCHER.catch_up()


def register(name: str) -> None:
    """Register with the library whose module of this name is imported.

    A library whose version does not fit must still be usable without LittleBit, so that no error leaves this function.
    """
    try:
        ours = importlib.import_module(REGISTERS[name], __package__)
        if hasattr(ours, "register"):  # else it is being imported just now, and registers at its end
            ours.register()
    except Exception as error:
        package = name.split(".")[0]
        log.warning("littlebit cannot plug into this version of %s (%s): pip install -U %s", package, error, package)


class Watcher(MetaPathFinder):
    """Leaves finding modules to others, and registers with the libraries when they have been imported."""

    def __init__(self) -> None:
        self.missing = set(REGISTERS)  # modules that were not seen yet
        self.asking = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of one of the modules as others find it, with one more step at its end; None for all others."""
        self.catch_up()
        if name not in REGISTERS:
            return None
        if getattr(self.asking, "others", False):  # another finder asks all finders in its turn
            return None
        self.asking.others = True
        try:
            specs = (find(name, path, target) for find in map(self.find_of, list(sys.meta_path)))
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self.asking.others = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec = copy(spec)
            spec.loader = Announcing(spec.loader)
        return spec

    def find_of(self, finder: Any) -> Callable[..., ModuleSpec | None]:
        """How a finder finds a module; not at all, if it is this one or has no such method."""
        found = None if finder is self else getattr(finder, "find_spec", None)
        return found or (lambda name, path, target: None)

    def catch_up(self) -> None:
        """Register with libraries whose modules were imported unnoticed."""
        for name in list(self.missing):
            module = sys.modules.get(name)
            if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
                self.tell(name)

    def tell(self, name: str) -> None:
        """Register with the library whose module was imported."""
        self.missing.discard(name)
        register(name)


class Announcing(Loader):
    """Another loader, with one more step after the module has run; for all else it is that loader."""

    def __init__(self, loader: Any):
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # a copy that is being made has none yet
            raise AttributeError(name)
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The module as the other loader makes it."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, let it forget this loader, and register."""
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        WATCHER.tell(module.__name__)


WATCHER = Watcher()
