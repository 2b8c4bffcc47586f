"""Measure which channels and layers matter, from a model's activations and gradients on calibration text."""

import contextlib
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._checks import flat_tokens, window_for
from .._progress import tqdm
from ..files.cache import cache_path
from ..files.digests import tensor_bytes
from ..files.mapped import release_pages
from .blocks import BlockStream
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
    device: str | torch.device | None = None,
) -> dict[str, Moments]:
    """Measure second moments of inputs and output gradients of linear layers (after NanoQuant, arXiv 2602.06694).

    To second order, with a diagonal Kronecker-factored Fisher matrix, replacing W by W_hat raises the loss per token by
    half of

    sum_ij outputs_i inputs_j (W - W_hat)_ij^2

    If all layers are in the decoder blocks, one block after another is computed in float32: forward for all windows,
    then backward. Only one block's weights are in memory at once, and the inputs of the blocks are kept in a temporary
    file of the cache folder.

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
    device : str or torch.device, optional
        Where to compute; by default where the model is.

    Returns
    -------
    dict of layer name to Moments.

    Raises
    ------
    ValueError
        If there are fewer than two tokens, they have another shape, a token has no row in the embedding, or the window
        has fewer than two tokens or more than the model has positions.
    """
    names = list(names)
    parts = windows(flat_tokens(tokens, model, least=2), window_for(model, window, CALIBRATION_WINDOW))
    own = next(model.parameters()).device
    sums: dict[str, list[Tensor]] = {name: [torch.zeros((), device=device or own)] * 2 for name in names}
    with frozen(model):
        stream = BlockStream(model, len(parts[0]), device)
        if stream.covers(names):
            stream_moments(stream, parts, sums, progress)
        else:
            with watched(model, sums):
                for part in tqdm(parts, desc="calibrating", unit="window", disable=not progress):
                    accumulate(model, part.to(own))
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


def stream_moments(stream: BlockStream, parts: list[Tensor], sums: dict[str, list[Tensor]], progress: bool) -> None:
    """Accumulate the moments of layers in the blocks: all windows pass through one block before the next.

    The backward pass computes each block again from its stored inputs.
    """
    states = torch.stack([stream.embed(part).cpu() for part in parts])  # (windows, window, hidden)
    count = len(stream.blocks)
    folder = cache_path(room=count * states.nbytes)
    with (
        tempfile.TemporaryFile(dir=folder) as file,
        tqdm(total=2 * count, desc="calibrating", unit="block", disable=not progress) as bar,
    ):
        for at in range(count):
            file.write(tensor_bytes(states))
            weights = stream.weights_of(at)
            with torch.no_grad():
                for window in states:
                    window.copy_(stream.block(at, window.to(stream.device), weights))
            bar.update()
        weights = stream.outer_weights()
        for row, tokens in enumerate(parts):  # from here on, gradients of the states
            leaf = states[row].to(stream.device, copy=True).requires_grad_()
            states[row] = next_token_gradient(stream, leaf, weights, tokens)
        with watched(stream.model, sums):
            for at in reversed(range(count)):
                weights = stream.weights_of(at)
                file.seek(at * states.nbytes)
                for row in range(len(states)):
                    stored = torch.frombuffer(bytearray(file.read(states[row].nbytes)), dtype=states.dtype)
                    leaf = stored.view_as(states[row]).to(stream.device).requires_grad_()
                    with torch.enable_grad():
                        stream.block(at, leaf, weights).backward(states[row].to(stream.device))
                    states[row] = gradient_of(leaf)
                bar.update()


def next_token_gradient(stream: BlockStream, leaf: Tensor, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Compute the gradient of the summed next-token loss at the output of the last block, (window, hidden)."""
    with torch.enable_grad():
        logits = stream.logits(leaf, weights)[:-1]
        functional.cross_entropy(logits, tokens[1:].to(logits.device), reduction="sum").backward()
    return gradient_of(leaf)


def gradient_of(leaf: Tensor) -> Tensor:
    """Return the gradient that a backward pass left."""
    assert leaf.grad is not None
    return leaf.grad


@contextlib.contextmanager
def watched(model: nn.Module, sums: Mapping[str, list[Tensor]]) -> Iterator[None]:
    """Accumulate squared inputs and squared output gradients of layers while the context is active."""
    handles = [watch(model.get_submodule(name), kept) for name, kept in sums.items()]
    try:
        yield
    finally:
        for pair in handles:
            for handle in pair:
                handle.remove()


def watch(layer: nn.Module, kept: list[Tensor]) -> tuple:
    """Add hooks that sum a layer's squared inputs in kept[0] and its squared output gradients in kept[1]."""

    def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept[0] = kept[0] + inputs[0].detach().float().square().flatten(0, -2).sum(0)

    def backward(module: nn.Module, grad_inputs: Any, grad_outputs: Any) -> None:
        kept[1] = kept[1] + grad_outputs[0].float().square().flatten(0, -2).sum(0)

    return layer.register_forward_hook(forward), layer.register_full_backward_hook(backward)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter get a gradient while the context is active."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def accumulate(model: nn.Module, tokens: Tensor) -> None:
    """Run a forward and backward pass of the summed next-token loss through the whole model."""
    with torch.enable_grad():
        embedded = model.get_input_embeddings()(tokens[None]).detach().requires_grad_()  # type: ignore[operator]
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0, :-1]
        functional.cross_entropy(logits.float(), tokens[1:], reduction="sum").backward()


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
        release_pages()
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
