"""Call an implementation with NumPy arrays, and record the calls, so that a failure can be shown as Python."""

import importlib
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from littlebit import reference

#: Named tuples of `littlebit.reference`; a backend's own ones of the same names are built from the same fields.
TUPLES = {name: getattr(reference, name) for name in ("Factors", "PackedFactors", "Latents")}

#: What a module may declare about itself, and what holds if it does not.
DECLARATIONS: dict[str, Any] = {
    "DTYPES": ("float32",),  # dtypes of inputs, weights and gradients
    "DEVICES": (None,),  # each is passed on, to_backend(array, device), unless it is None
    "LARGEST": 70,  # most rows, columns and ranks that laws draw: lower it for a simulator
}


class Call(NamedTuple):
    """Hold one call: `function` as Python names it, such as backend.linear, and its arguments as NumPy arrays."""

    function: str
    arguments: tuple[Any, ...]


class Backend:
    """Wrap a module, so that its functions take and return NumPy arrays.

    Arguments become the module's arrays by its function `to_backend(array)`, results NumPy arrays by its
    `from_backend(array)`. Without these, functions get NumPy arrays, and `numpy.asarray` reads their results. `DTYPES`,
    `DEVICES` and `LARGEST` are what the module declares of that name; see DECLARATIONS.

    Parameters
    ----------
    module : str or module
        Imported if it is a name.
    device : str, optional
        One of the module's DEVICES.

    Raises
    ------
    ImportError
        If there is no such module.

    Examples
    --------
    >>> Backend("littlebit.reference").pack_signs(np.array([1.0, -1.0]))
    array([2], dtype=uint8)
    """

    def __init__(self, module: str | ModuleType, device: str | None = None):
        self.module = importlib.import_module(module) if isinstance(module, str) else module
        self.name = module if isinstance(module, str) else module.__name__
        self.device = device
        self.calls: list[Call] = []

    def declared(self, name: str) -> Any:
        """Return what the module declares under a name of DECLARATIONS, or its default."""
        return getattr(self.module, name, DECLARATIONS[name])

    def missing(self, functions: Sequence[str]) -> list[str]:
        """List the functions that the module does not have."""
        return [name for name in functions if not callable(getattr(self.module, name, None))]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Return a function of the module that takes and returns NumPy arrays."""
        function = getattr(self.module, name)

        def call(*arguments: Any) -> Any:
            self.calls.append(Call(f"backend.{name}", arguments))
            return self.from_backend(function(*map(self.to_backend, arguments)))

        return call

    def prepare(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function of this package that the backend's next call depends on, and record it."""
        self.calls.append(Call(f"{function.__module__.split('.')[-1]}.{function.__name__}", arguments))
        function(*arguments)

    def to_backend(self, value: Any) -> Any:
        """Convert arrays, also inside named tuples, lists and dicts, to the module's arrays."""
        if isinstance(value, np.ndarray):
            convert = getattr(self.module, "to_backend", None)
            if convert is None:
                return value
            return convert(value) if self.device is None else convert(value, self.device)
        if type(value).__name__ in TUPLES:
            cls = getattr(self.module, type(value).__name__, type(value))
            return cls(*map(self.to_backend, value))
        if isinstance(value, list | tuple):
            return type(value)(map(self.to_backend, value))
        if isinstance(value, dict):
            return {name: self.to_backend(each) for name, each in value.items()}
        return value

    def from_backend(self, value: Any) -> Any:
        """Convert the module's arrays, also inside named tuples, lists and dicts, to NumPy arrays."""
        fields = getattr(value, "_fields", None)
        for cls in TUPLES.values():
            if fields == cls._fields:
                return cls(*map(self.from_backend, value))
        if isinstance(value, list | tuple):
            return type(value)(map(self.from_backend, value)) if fields is None else value
        if isinstance(value, Mapping):
            return {name: self.from_backend(each) for name, each in value.items()}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        return np.asarray(getattr(self.module, "from_backend", np.asarray)(value))


def as_python(backend: Backend) -> str:
    """Write the calls that a backend recorded as lines of Python to paste."""
    calls = [f"{each.function}({', '.join(map(literal, each.arguments))})" for each in backend.calls]
    text = "\n".join(f"print({call})" if call.startswith("backend.") else call for call in calls)
    names = ", ".join(name for name in TUPLES if re.search(rf"\b{name}\(", text))
    lines = ["import numpy as np"] if "np." in text else []
    lines += ["from pathlib import Path"] if "Path(" in text else []
    lines += [f"from littlebit.conformance import Backend{', checkpoint' if 'checkpoint.' in text else ''}"]
    lines += [f"from littlebit.reference import {names}"] if names else []
    device = "" if backend.device is None else f", device={backend.device!r}"
    return "\n".join([*lines, "", f"backend = Backend({backend.name!r}{device})", text])


def literal(value: Any) -> str:
    """Write a value as a Python expression; arrays keep every bit.

    Examples
    --------
    >>> literal(np.ones(3, np.float32)), literal([np.array([1, 2])])
    ("np.full((3,), 1.0, 'float32')", "[np.array([1, 2], 'int64')]")
    """
    if isinstance(value, np.ndarray):
        entries = value.tolist()
        if value.size == 0:
            return f"np.zeros({value.shape}, {str(value.dtype)!r})"
        if (value == value.flat[0]).all() and value.size > 1:
            return f"np.full({value.shape}, {value.flat[0].item()!r}, {str(value.dtype)!r})"
        return f"np.array({entries!r}, {str(value.dtype)!r})".replace("nan", "np.nan").replace("inf", "np.inf")
    if isinstance(value, Path):
        scratch = Path(tempfile.gettempdir()) in value.parents  # a folder that is gone when the example is pasted
        return f"Path({(value.name if scratch else str(value))!r})"
    if hasattr(value, "_fields"):
        fields = (f"{name}={literal(each)}" for name, each in zip(value._fields, value, strict=True))
        return f"{type(value).__name__}({', '.join(fields)})"
    if isinstance(value, list | tuple):
        inside = ", ".join(map(literal, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside},)"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name!r}: {literal(each)}" for name, each in value.items()) + "}"
    return repr(value)
