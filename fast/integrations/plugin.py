"""Extend torch, transformers and PEFT when they are imported, without importing them.

transformers and PEFT have no entry point for a new quantization method, and the only one of torch, `torch.backends`,
would load LittleBit into every program that imports torch. So `PostImportHook` stands first in `sys.meta_path` and runs
our `register` functions after the modules in `REGISTRARS`.

The hook finds no module itself. It takes the spec that the other finders return and wraps its loader for this one
import; a loader may serve other modules, so it is never changed. This works whoever asks for a module first, after an
import that failed, and after a reload. If another finder answers before the hook does, the hook notices at the next
import of any module.
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

#: Module of a library -> our module whose `register()` extends it.
REGISTRARS = {
    "torch": "..kernels.torch_op",
    "transformers.quantizers.auto": ".hf_quantizer",
    "peft.tuners.lora.model": ".peft_lora",
}


def register() -> None:
    """Extend the libraries: those that are imported now, the others when they are."""
    sys.meta_path[:] = [HOOK, *(finder for finder in sys.meta_path if finder is not HOOK)]
    HOOK.check_imported()


def extend(name: str) -> None:
    """Extend the library that has just imported a module of REGISTRARS.

    A library whose version does not fit must stay usable without LittleBit, so no error leaves this function.
    """
    try:
        ours = importlib.import_module(REGISTRARS[name], __package__)
        if hasattr(ours, "register"):  # else it is being imported right now, and calls `register` at its end
            ours.register()
    except Exception as error:
        package = name.split(".")[0]
        log.warning("littlebit cannot plug into this version of %s (%s): pip install -U %s", package, error, package)


class PostImportHook(MetaPathFinder):
    """Call `extend` after a module of REGISTRARS has run; leave finding it to the other finders."""

    def __init__(self) -> None:
        self.missing = set(REGISTRARS)  # modules not yet seen
        self.asking = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Wrap the spec that other finders return for a module of REGISTRARS; return None for all other modules."""
        self.check_imported()
        if name not in REGISTRARS:
            return None
        if getattr(self.asking, "others", False):  # a finder that we ask asks all finders, and so us again
            return None
        self.asking.others = True
        try:
            specs = (find(name, path, target) for find in map(self.find_of, list(sys.meta_path)))
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self.asking.others = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec = copy(spec)
            spec.loader = HookedLoader(spec.loader)
        return spec

    def find_of(self, finder: Any) -> Callable[..., ModuleSpec | None]:
        """Return a finder's `find_spec`, or a function that finds nothing for this hook and for older finders."""
        found = None if finder is self else getattr(finder, "find_spec", None)
        return found or (lambda name, path, target: None)

    def check_imported(self) -> None:
        """Extend the libraries whose modules were imported without passing through this hook."""
        for name in list(self.missing):
            module = sys.modules.get(name)
            if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
                self.module_imported(name)

    def module_imported(self, name: str) -> None:
        """Extend the library of a module that has been imported."""
        self.missing.discard(name)
        extend(name)


class HookedLoader(Loader):
    """Delegate to another loader, and call the hook after the module has run."""

    def __init__(self, loader: Any):
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # a copy in the making has no loader yet
            raise AttributeError(name)
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module with the other loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, put the other loader back into it, and call the hook."""
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        HOOK.module_imported(module.__name__)


HOOK = PostImportHook()
