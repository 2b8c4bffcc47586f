"""Find modules and parameters that a model holds in several places, and share them again after loading.

They are quantized once and stored once. Ties that the model's class handles itself, such as the head's to the
embedding, are left to the class.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..files.untrusted import CheckpointError


def parameter_users(model: nn.Module) -> dict[int, list[str]]:
    """Map the id of each parameter to the first names of the modules that hold it."""
    users = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[id(parameter)].append(name)
    return users


def shared_names(model: Any) -> dict[str, str]:
    """Map each further name of a shared module or parameter to its first name.

    The contents of a shared module are not listed. Ties that the model's class handles are left out.
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
    """Assign modules and parameters to their further names, as `shared_names` found them."""
    for name, first in names.items():
        assign(model, name, lookup(model, first))


def share_checked(model: nn.Module, names: Any, where: Path | str) -> dict[str, str]:
    """Share the modules and parameters that an untrusted configuration lists, if they are alike.

    Both must hold tensors with the same names, shapes and dtypes, so no module can be put inside itself.

    Parameters
    ----------
    model : torch.nn.Module
    names : mapping
        `shared` in the quantization_config: further name -> first name. None: nothing is shared.
    where : Path or str
        The configuration file, for the error.

    Returns
    -------
    The checked names.

    Raises
    ------
    CheckpointError
        If the model has no such names, or their tensors differ.
    """
    if not isinstance(names or {}, dict):
        raise CheckpointError(f"{where}: 'shared' must map names to names, got {names!r}")
    for name, first in (names or {}).items():
        try:
            one, other = contents_of(lookup(model, first)), contents_of(lookup(model, name))
        except (AttributeError, TypeError) as error:
            raise CheckpointError(f"{where}: 'shared' names {first!r} and {name!r}, but {error}") from error
        if not one or one != other:
            raise CheckpointError(
                f"{where}: 'shared' says that {name} is {first}, but their tensors differ; copy the files again"
            )
        share(model, {name: first})
    return names or {}


def lookup(model: nn.Module, name: str) -> nn.Module | nn.Parameter:
    """Return the module or parameter of a name, or raise AttributeError."""
    try:
        return model.get_parameter(name)
    except AttributeError:
        return model.get_submodule(name)


def assign(model: nn.Module, name: str, what: nn.Module | nn.Parameter) -> None:
    """Assign a module or parameter to a name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, what)


def contents_of(what: nn.Module | nn.Parameter) -> dict[str, tuple[Any, ...]]:
    """Map names to shape and dtype of the tensors of a module, or of a parameter."""
    tensors = {"": what} if isinstance(what, nn.Parameter) else what.state_dict()
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def refuse_shared(model: Any, form: str) -> None:
    """Raise ValueError if a model shares modules or parameters, for formats that cannot express it."""
    if names := shared_names(model):
        name, first = next(iter(names.items()))
        raise ValueError(
            f"{form} cannot express that {name} is {first}: save the model with littlebit.fast.save instead"
        )
