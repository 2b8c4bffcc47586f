"""Run a model one decoder block at a time, so that only one block's weights are in memory at once.

`BlockStream` finds what the model passes to its blocks (masks, rotary angles) by a forward pass in which each block
returns its input. It then runs the blocks themselves, in float32 and on any device, whatever the dtype of the weights.
"""

import contextlib
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..files.mapped import release_pages


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """Find the decoder blocks of a model. Raise ValueError if it holds no list of modules."""
    return list(block_list(model))


def block_list(model: nn.Module) -> nn.ModuleList:
    """Find the list that holds a model's decoder blocks: its longest list of modules.

    Raises
    ------
    ValueError
        If the model holds no list of modules.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ValueError(
            "the model must hold its decoder blocks in a torch.nn.ModuleList, and has none: without it, do not train "
            "block by block, compile or shard"
        )
    return max(lists, key=len)


class LastCall(Exception):  # noqa: N818 (not an error)
    """Stop a forward pass at a block whose call was all that mattered."""


class BlockStream:
    """Run the parts of a model one after another: embedding, each decoder block, and what follows the last block.

    Parameters
    ----------
    model : transformers causal language model
    length : int
        Tokens of the sequences that it will read, one at a time.
    device : str or torch.device, optional
        Where to compute; by default where the model is.
    """

    def __init__(self, model: nn.Module, length: int, device: str | torch.device | None = None):
        self.model, self.blocks = model, decoder_blocks(model)
        self.own = next(model.parameters()).device
        self.device = torch.device(device) if device else self.own
        self.calls: dict[int, tuple[tuple, dict[str, Any]]] = {}
        self.first: Tensor | None = None  # input of the first block
        tokens = torch.zeros(length, dtype=torch.long)
        with torch.no_grad():
            self.skeleton(self.look_up(tokens), last=0)
            arguments, keywords = self.calls[0]
            output = functional_call(self.blocks[0], self.weights_of(0), (self.moved(self.first), *arguments), keywords)
            self.tuples = isinstance(output, tuple)  # whether blocks return tuples
            self.skeleton(self.look_up(tokens), last=len(self.blocks) - 1)

    def covers(self, names: Iterable[str]) -> bool:
        """Tell whether all these layers are inside the blocks, which run once each and in order."""
        inside = {id(module) for block in self.blocks for module in block.modules()}
        return list(self.calls) == list(range(len(self.blocks))) and all(
            id(self.model.get_submodule(name)) in inside for name in names
        )

    def look_up(self, tokens: Tensor) -> Tensor:
        """Look up the embeddings of (length,) tokens, (1, length, hidden) float32."""
        return self.model.get_input_embeddings()(tokens[None].to(self.own)).float()  # type: ignore[operator]

    def embed(self, tokens: Tensor) -> Tensor:
        """Compute the first block's input, (length, hidden) float32 on the device, of (length,) tokens."""
        with torch.no_grad():
            self.skeleton(self.look_up(tokens), last=0)
        return self.moved(self.first)[0]

    def block(self, at: int, states: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Compute the output of a block from its input, both (length, hidden).

        Parameters
        ----------
        at : int
        states : (length, hidden) float32 tensor on the device
        weights : dict
            From `weights_of(at)`.
        """
        arguments, keywords = self.calls[at]
        output = functional_call(self.blocks[at], weights, (states[None], *arguments), keywords)
        return (output[0] if self.tuples else output)[0]

    def weights_of(self, at: int) -> dict[str, Tensor]:
        """Copy the parameters and buffers of a block to the device, floats in float32; drop mapped pages."""
        found = converted(self.blocks[at], self.moved)
        release_pages()
        return found

    def logits(self, states: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Compute the logits, (length, vocabulary), from the output of the last block.

        Parameters
        ----------
        states : (length, hidden) float32 tensor on the device
        weights : dict
            From `outer_weights`.
        """
        return self.skeleton(states.detach()[None], states=states[None], weights=weights).logits[0]

    def outer_weights(self) -> dict[str, Tensor]:
        """Copy the parameters and buffers outside of the blocks to the device, floats in float32.

        The input embedding is left out, unless it is also the head.
        """
        inside = {id(tensor) for block in self.blocks for tensor in (*block.parameters(), *block.buffers())}
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()  # type: ignore[operator]
        inside |= {id(p) for p in embedding.parameters()} - {id(p) for p in head.parameters()}
        found = converted(self.model, self.moved, inside)
        release_pages()
        return found

    def moved(self, value: Any) -> Any:
        """Move the tensors in a value to the device, floats as float32."""
        if isinstance(value, tuple):
            return tuple(map(self.moved, value))
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(self.device, torch.float32 if value.is_floating_point() else value.dtype)

    def skeleton(
        self,
        embedded: Tensor,
        last: int | None = None,
        states: Tensor | None = None,
        weights: dict[str, Tensor] | None = None,
    ) -> Any:
        """Run the model with blocks that note their calls and return their input.

        Parameters
        ----------
        embedded : (1, length, hidden) tensor
        last : int, optional
            Block at whose call to stop.
        states : (1, length, hidden) tensor, optional
            What the first block returns.
        weights : dict, optional
            Tensors to use in place of the model's own.
        """

        def stub(at: int) -> Any:
            def forward(hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
                self.calls[at] = self.moved(arguments), {key: self.moved(each) for key, each in keywords.items()}
                if at == 0:
                    self.first = hidden_states.detach()
                if at == last:
                    raise LastCall
                output = hidden_states if at or states is None else states
                return (output,) if self.tuples else output

            return forward

        before = [vars(block).get("forward") for block in self.blocks]
        try:
            for at, block in enumerate(self.blocks):
                block.forward = stub(at)  # type: ignore[method-assign]
            with contextlib.suppress(LastCall):
                return functional_call(
                    self.model, weights or {}, kwargs={"inputs_embeds": embedded, "use_cache": False}
                )
        finally:
            for block, forward in zip(self.blocks, before, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward  # type: ignore[method-assign]


def converted(
    module: nn.Module, convert: Callable[[Tensor], Tensor], without: Container[int] = ()
) -> dict[str, Tensor]:
    """Convert a module's parameters and buffers; return them by name, leaving out those with an id in `without`."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: convert(tensor) for name, tensor in tensors.items() if id(tensor) not in without}
