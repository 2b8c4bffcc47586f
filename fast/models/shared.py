"""What a model holds in several places: modules that stand twice, and parameters that several modules have.

It is quantised once, stored once, and shared again after loading. Ties that a model's own class knows, such as that of
the head to the embedding, are left to the class.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..files.untrusted import CheckpointError


def parameter_users(model: nn.Module) -> dict[int, list[str]]:
    """List the modules, by their first names, that have each parameter, by its id."""
    users = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[id(parameter)].append(name)
    return users


def shared_names(model: Any) -> dict[str, str]:
    """Name what a model holds in several places: the further names of modules and parameters, with the first ones.

    Of a module in two places only itself is named, not what it holds. Ties that the class knows are left out.
    """
    known = model.get_expanded_tied_weights_keys(all_submodels=True)
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(tuple(f"{each}." for each in found)):
            continue
        if first.setdefault(id(module), name) != name:
            if module.state_dict():
                found[name] = first[id(module)]
            continue
        for key, parameter in module._parameters.items():
            place = f"{name}.{key}" if name else key
            if parameter is not None and first.setdefault(id(parameter), place) != place and place not in known:
                found[place] = first[id(parameter)]
    return found


def share(model: nn.Module, names: Mapping[str, str]) -> None:
    """Put modules and parameters into their further places, as `shared_names` found them."""
    for name, first in names.items():
        put(model, name, thing(model, first))


def share_checked(model: nn.Module, names: Any, where: Path | str) -> dict[str, str]:
    """Share what a configuration, which may come from anyone, says to be shared, in a model of the class's own modules.

    Both must hold tensors of the same names, shapes and dtypes, so no module comes to stand within itself.

    Parameters
    ----------
    model : torch.nn.Module
    names : mapping
        What `shared` says in the section of the configuration; None for nothing.
    where : Path or str
        The configuration, for the error.

    Returns
    -------
    The names, checked.

    Raises
    ------
    CheckpointError
        If the model has no such places, or the two are not alike.
    """
    if not isinstance(names or {}, dict):
        raise CheckpointError(f"{where}: 'shared' must map names to names, got {names!r}")
    for name, first in (names or {}).items():
        try:
            one, other = contents_of(thing(model, first)), contents_of(thing(model, name))
        except (AttributeError, TypeError) as error:
            raise CheckpointError(f"{where}: 'shared' names {first!r} and {name!r}, but {error}") from error
        if not one or one != other:
            raise CheckpointError(f"{where}: 'shared' says that {name} is {first}, but they are not alike")
        share(model, {name: first})
    return names or {}


def thing(model: nn.Module, name: str) -> nn.Module | nn.Parameter:
    """Return the module or parameter of a name; AttributeError if there is none."""
    try:
        return model.get_parameter(name)
    except AttributeError:
        return model.get_submodule(name)


def put(model: nn.Module, name: str, what: nn.Module | nn.Parameter) -> None:
    """Let a name stand for a module or parameter."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, what)


def contents_of(what: nn.Module | nn.Parameter) -> dict[str, tuple[Any, ...]]:
    """Return shape and dtype of each tensor of a module, or of a parameter."""
    tensors = {"": what} if isinstance(what, nn.Parameter) else what.state_dict()
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def refuse_shared(model: Any, form: str) -> None:
    """Raise ValueError if a model holds something in several places, for formats that cannot say so."""
    if names := shared_names(model):
        name, first = next(iter(names.items()))
        raise ValueError(f"{form} cannot say that {name} is {first}: save the model with littlebit.fast.save instead")
