"""Tells torch, transformers and PEFT about LittleBit as soon as they are imported, and never imports them."""

import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

log = logging.getLogger(__name__)


def announce() -> None:
    """Register LittleBit with the libraries: now if they are imported already, else at the moment when they are."""
    for name, register in REGISTERS.items():
        if name in sys.modules:
            register()
        else:
            sys.meta_path.insert(0, Waiting(name, register))


def register_operators() -> None:
    """Import the module that defines the operator of the packed layer, which saved programs may hold."""
    from . import operators as operators


def register_quantizer() -> None:
    """Import the module that puts the quantiser into transformers' lists, if it is not what imports transformers."""
    from . import quantizer as quantizer


def register_lora() -> None:
    """Import the module that tells PEFT's LoRA of packed layers, if it is not what imports PEFT."""
    from . import lora as lora


# The modules in which the libraries keep what is to be extended
REGISTERS = {
    "torch": register_operators,
    "transformers.quantizers.auto": register_quantizer,
    "peft.tuners.lora.model": register_lora,
}


class Waiting(MetaPathFinder):
    """Leaves finding modules to others; once the module of this name has run, something else is done too."""

    def __init__(self, name: str, then: Callable[[], None]):
        self.name, self.then = name, then

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the module as others find it, with one more step at its end; None for all other modules."""
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_tell(module: ModuleType) -> None:
                run(module)
                self.tell()

            spec.loader.exec_module = run_and_tell  # type: ignore[method-assign]
        return spec

    def tell(self) -> None:
        """Do it; a library whose version is too old must still be usable without LittleBit."""
        try:
            self.then()
        except (ImportError, AttributeError) as error:
            package = self.name.split(".")[0]
            log.warning(
                "littlebit cannot plug into this version of %s (%s): pip install -U %s", package, error, package
            )
