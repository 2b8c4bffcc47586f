"""Choose a function by its registered name, or take a function of the user's own."""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any


def register(kind: str, registry: MutableMapping[str, Any], name: str, entry: Any) -> None:
    """Add an entry to a registry.

    Raises
    ------
    ValueError
        If the name is empty or taken.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"the name of {kind} must be a string that is not empty, got {name!r}")
    if name in registry:
        raise ValueError(f"the name of {kind} must be new, got {name!r}, which is registered: choose another name")
    registry[name] = entry


def check_choice(kind: str, registry: Mapping[str, Any], choice: Any) -> None:
    """Raise ValueError unless a choice is a registered name or a function."""
    if not callable(choice) and not (isinstance(choice, str) and choice in registry):
        raise ValueError(f"{kind} must be one of {', '.join(registry)}, or a function, got {choice!r}")


def choice_name(choice: str | Callable) -> str:
    """Name a choice for logs and files: a registered name, or module:function.

    Examples
    --------
    >>> choice_name("admm"), choice_name(functools.partial(choice_name, "admm"))
    ('admm', 'littlebit.fast.models.registry:choice_name')
    """
    if isinstance(choice, str):
        return choice
    function: Any = choice.func if isinstance(choice, functools.partial) else choice
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def load_function(name: str) -> Callable:
    """Import a function that a command line names as module:function, from the current folder too.

    This runs the module's code: never call it with a name from a file that others wrote.

    Raises
    ------
    ValueError
        If there is no such function.

    Examples
    --------
    >>> load_function("math:sqrt")(4.0)
    2.0
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = functools.reduce(getattr, function.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name!r} must name a function as module:function ({error})") from error
    if not callable(found):
        raise ValueError(f"{name!r} must name a function, got {type(found).__name__}")
    return found
