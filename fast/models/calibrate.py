"""Measure which channels and layers matter, from a model's activations and gradients on calibration text."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._checks import flat_tokens, window_for
from .._progress import tqdm
from .packed_shapes import layer_type

CALIBRATION_WINDOW = 512


class Moments(NamedTuple):
    """Hold the second moments of one linear layer, averaged over the tokens of calibration text.

    Attributes
    ----------
    inputs : (d_in,) float32
        Mean of x^2 per input channel.
    outputs : (d_out,) float32
        Mean of (dL/dy)^2 per output channel, where L is the summed next-token loss of a window.
    """

    inputs: Tensor
    outputs: Tensor


def calibrate(
    model: nn.Module,
    tokens: Tensor,
    names: Iterable[str],
    window: int | None = None,
    progress: bool = True,
) -> dict[str, Moments]:
    """Measure second moments of inputs and output gradients of linear layers (after NanoQuant, arXiv 2602.06694).

    To second order, with a diagonal Kronecker-factored Fisher matrix, replacing W by W_hat raises the loss per token by
    half of

    sum_ij outputs_i inputs_j (W - W_hat)_ij^2

    Parameters
    ----------
    model : transformers causal language model
    tokens : (n,) or (1, n) integer tensor
        Calibration text, at least two tokens. It is cut into windows; an incomplete last one is dropped, unless it is
        the only one.
    names : iterable of str
        Names of linear layers.
    window : int, optional
        Tokens in a window; by default 512, or all positions of a model that has fewer.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    dict of layer name to Moments.

    Raises
    ------
    ValueError
        If there are fewer than two tokens, they have another shape, a token has no row in the embedding, or the window
        has fewer than two tokens or more than the model has positions.
    """
    parts = windows(flat_tokens(tokens, model, least=2), window_for(model, window, CALIBRATION_WINDOW))
    device = next(model.parameters()).device
    sums: dict[str, list[Tensor]] = {name: [torch.zeros((), device=device)] * 2 for name in names}
    handles = [watch(model.get_submodule(name), kept) for name, kept in sums.items()]
    try:
        for part in tqdm(parts, desc="calibrating", unit="window", disable=not progress):
            accumulate(model, part.to(device))
    finally:
        for pair in handles:
            for handle in pair:
                handle.remove()
    count = sum(map(len, parts))
    found = {name: Moments(*(total / count for total in kept)) for name, kept in sums.items()}
    return {name: each if each.outputs.ndim else unreached(model, name, found) for name, each in found.items()}


def unreached(model: nn.Module, name: str, found: Mapping[str, Moments]) -> Moments:
    """Replace the moments of a layer that no token reached: by the mean over the block's other experts, or zeros."""
    same = []
    if "." in layer_type(name):
        experts, at, projection = name.rsplit(".", 2)
        count = len(model.get_submodule(experts))  # type: ignore[arg-type]
        same = [found.get(f"{experts}.{other}.{projection}") for other in range(count) if other != int(at)]
        same = [each for each in same if each is not None and each.outputs.ndim]
    if same:
        return Moments(*(torch.stack(each).mean(0) for each in zip(*same, strict=True)))
    weight: Any = model.get_submodule(name).weight
    return Moments(*(weight.new_zeros(size, dtype=torch.float32) for size in reversed(weight.shape)))


def watch(layer: nn.Module, kept: list[Tensor]) -> tuple:
    """Add hooks that sum a layer's squared inputs in kept[0] and its squared output gradients in kept[1]."""

    def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept[0] = kept[0] + inputs[0].detach().float().square().flatten(0, -2).sum(0)

    def backward(module: nn.Module, grad_inputs: Any, grad_outputs: Any) -> None:
        kept[1] = kept[1] + grad_outputs[0].float().square().flatten(0, -2).sum(0)

    return layer.register_forward_hook(forward), layer.register_full_backward_hook(backward)


def accumulate(model: nn.Module, tokens: Tensor) -> None:
    """Run a forward and backward pass of the summed next-token loss; no parameter gets a gradient."""
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            embedded = model.get_input_embeddings()(tokens[None]).detach().requires_grad_()  # type: ignore[operator]
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0, :-1]
            functional.cross_entropy(logits.float(), tokens[1:], reduction="sum").backward()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def spectral_gains(weights: Mapping[str, Tensor], moments: Mapping[str, Moments]) -> dict[str, list[float]]:
    """Estimate the loss that each further rank of each layer saves, for `bits.allocate_ranks`.

    gain of rank k = k-th squared singular value of diag(sqrt(outputs)) W diag(sqrt(inputs))

    A real factorization saves this much. Binary factors save a part of it, which is assumed to be the same in every
    layer.

    Parameters
    ----------
    weights : mapping of layer name to (d_out, d_in) tensor
    moments : mapping of layer name to Moments

    Returns
    -------
    dict of layer name to min(d_out, d_in) gains, in falling order.
    """
    gains = {}
    for name, weight in weights.items():
        inputs, outputs = moments[name]
        scaled = (outputs.sqrt()[:, None] * weight.float() * inputs.sqrt()).double()
        short = scaled if scaled.shape[0] <= scaled.shape[1] else scaled.mT
        squares = torch.linalg.eigvalsh(short @ short.mT)  # much faster than an SVD
        gains[name] = squares.flip(0).clamp(min=0).tolist()
    return gains


def bounded_gains(
    gains: Mapping[str, Sequence[float]], ranks: Mapping[str, int], spread: float
) -> dict[str, list[float]]:
    """Change gains so that ranks chosen by them stay between rank / spread and rank * spread.

    The gain of ranks below the lower bound becomes infinite, and the gain of ranks above the upper bound 0.

    Parameters
    ----------
    gains : mapping of layer name to the gain of each further rank
    ranks : mapping of layer name to int
        For instance the ranks of uniform allocation.
    spread : float
        At least 1.

    Returns
    -------
    dict of layer name to gains.

    Examples
    --------
    >>> bounded_gains({"layer": [4.0, 3.0, 2.0, 1.0]}, {"layer": 2}, spread=1.5)
    {'layer': [inf, 3.0, 2.0, 0.0]}
    """
    bounded = {}
    for name, values in gains.items():
        lowest, highest = math.floor(ranks[name] / spread), math.ceil(ranks[name] * spread)
        inside = [0.0 if rank >= highest else value for rank, value in enumerate(values)]
        bounded[name] = [math.inf] * lowest + inside[lowest:]
    return bounded


def windows(tokens: Tensor, window: int) -> list[Tensor]:
    """Cut a text's tokens into consecutive windows that do not overlap.

    An incomplete last window is dropped, unless it is the only one.
    """
    length = min(window, len(tokens))
    return list(tokens[: len(tokens) // length * length].split(length))
