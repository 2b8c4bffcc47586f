"""Keep old public names working for one version, with a DeprecationWarning that gives the new name.

`littlebit.reference` and `littlebit.fast` share this table. To rename something public, add a line here; in the
version after, delete the line. An old name never appears in `dir()`, in `from package import *` or in the book.
"""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

#: Old name -> new name of what a package exports.
NAMES = {
    "expansion": "up_projection",
    "Keeper": "Checkpointer",
    "rotate": "apply_rope",
}

#: (argument, old value) -> new value.
VALUES = {
    ("kv_cache", "ordinary"): "full",
}


def renamed_attribute(package: str, name: str) -> Any:
    """Find an old name in a package by its new name: the end of the package's `__getattr__` (PEP 562).

    Raises
    ------
    AttributeError
        If the package exports nothing under this name or its new one.
    """
    module, new = sys.modules[package], NAMES.get(name)
    if new is None or not hasattr(module, new):
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    warn(f"{package}.{name}", f"{package}.{new}", stacklevel=4)
    return getattr(module, new)


def renamed_keywords(**names: str) -> Callable[[F], F]:
    """Make a decorator that accepts keyword arguments under their old names: `@renamed_keywords(old="new")`.

    It decorates functions, and classes whose `__init__` takes the arguments (dataclasses).

    Examples
    --------
    >>> @renamed_keywords(centre="center")
    ... def move(x, center=0):
    ...     return x - center
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     move(3, centre=1)
    2
    >>> print(caught[0].message)
    move(centre=...) is now move(center=...); the next version drops the old name
    """

    def decorate(target: Any) -> Any:
        if isinstance(target, type):
            target.__init__ = accept(target.__init__, target.__name__)
            return target
        return accept(target, target.__name__)

    def accept(function: Callable, title: str) -> Callable:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            for old, new in names.items():
                if old in kwargs:
                    if new in kwargs:
                        raise TypeError(f"{title} takes {new!r}, once called {old!r}, and got both; give {new!r} alone")
                    warn(f"{title}({old}=...)", f"{title}({new}=...)", stacklevel=3)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return called

    return decorate


def renamed_value(argument: str, value: Any) -> Any:
    """Replace the old value of an argument by its new one; return any other value as it is."""
    if not isinstance(value, str) or (argument, value) not in VALUES:
        return value
    new = VALUES[argument, value]
    warn(f"{argument}={value!r}", f"{argument}={new!r}", stacklevel=4)
    return new


def warn(old: str, new: str, stacklevel: int) -> None:
    """Warn that `old` is now `new`; `stacklevel` counts frames from here to the user's call."""
    warnings.warn(f"{old} is now {new}; the next version drops the old name", DeprecationWarning, stacklevel)
