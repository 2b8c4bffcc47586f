"""Tells transformers about LittleBit as soon as transformers is imported, and never imports it."""

import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"  # the module that keeps transformers' lists of quantisers

log = logging.getLogger(__name__)


def announce() -> None:
    """Register LittleBit with transformers: now if that is imported already, else at the moment when it is."""
    if REGISTRY in sys.modules:
        register(sys.modules[REGISTRY])
    else:
        sys.meta_path.insert(0, Waiting())


class Waiting(MetaPathFinder):
    """Leaves finding modules to others; the registry's module registers LittleBit once it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the registry as others find it, with one more step at its end; None for all other modules."""
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                register(module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register(registry: ModuleType) -> None:
    """Put the configuration and the quantiser into transformers' lists, or warn that this transformers is too old."""
    try:
        from .quantizer import METHOD, LittleBitConfig, LittleBitQuantizer
    except ImportError as error:
        log.warning("littlebit needs transformers 5 or later to plug into it: pip install -U transformers (%s)", error)
        return
    registry.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = LittleBitConfig
    registry.AUTO_QUANTIZER_MAPPING[METHOD] = LittleBitQuantizer
