"""Register the quantization method `littlebit` with vLLM, which calls `register` in each of its processes.

The entry point of the group `vllm.general_plugins` in pyproject.toml names it. vLLM then loads a packed checkpoint from
its directory like any other model; vllm_method.py holds the method.
"""

from typing import Any


def register() -> None:
    """Let vLLM find the method by the name that stands in config.json."""
    from vllm.model_executor.layers.quantization import (  # pyright: ignore[reportMissingImports]
        register_quantization_config,
    )

    from .vllm_method import LittleBitConfig

    refuse_special_names()
    register_quantization_config("littlebit")(LittleBitConfig)


def refuse_special_names() -> None:
    """Let llvmlite's library object have no attribute `__dict__`.

    It answers any name with a function of the library. vLLM on a CPU reads the `__dict__` of each object in each module
    that is imported, and would stop at this one.
    """
    from llvmlite.binding import ffi

    if not hasattr(ffi.lib, "__dict__"):
        return
    kind: Any = type(ffi.lib)
    answer = kind.__getattr__

    def guarded(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return answer(self, name)

    kind.__getattr__ = guarded
