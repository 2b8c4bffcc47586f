"""Llama-like models as an engine for decode_cuda.py: nine kernels a layer, each started before the last has ended.

    projected = qkv(norm(x))      two kernels: the first stages of q, k and v together, and the second ones
    mixed = attend(projected)     one: rotates, keeps key and value, attends
    x += o(mixed)                 two
    wide = gate_up(norm(x))       two
    x += down(gate(wide))         two

x, the residual stream, is float32, and so is all between the kernels; keys and values are kept in float16. What reads a
norm's input multiplies by it while it reads, and what writes it sums up its squares (kernels/cuda.py, entries and
exits). Layers that the packed kernels do not take, dense ones among them, run one by one, with kernels for what is
between them; on a CPU everything is torch's.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kv_cache import latents
from ..models.embeddings import QuantizedEmbedding, QuantizedHead
from ..models.layers import PackedLinear
from .architecture import MODEL_TYPES, NORMS, PROJECTIONS, Architecture, NotDecodableError, architecture, rotary_angles
from .ops import CudaSteps, HeadNorms, Heads, Spans, Stream, TorchSteps, kept_width, split_heads, stored_latents

#: Types of models that the engine runs: those of the CPU's decoder, and Qwen3, whose queries and keys have norms.
FUSED_TYPES = (*MODEL_TYPES, "qwen3")


PREFILL = 512  # tokens of each prompt that pass through the model at once


MOST_PATHS, MOST_SIBLINGS = 2, 3  # of a layer, and layers, that one launch of the packed kernels takes


GROUPS = ("qkv", "output", "gate, up", "down")  # what a block's groups of layers are called, in order


class Block(NamedTuple):
    """The modules and norms of one block.

    Attributes
    ----------
    qkv, gate_up : sequence of modules
        Layers that share their input, in this order: one or more.
    output, down : module
    norms : pair of (hidden,) float32 tensor
        Before qkv, and before gate_up.
    head_norms : HeadNorms, optional
    """

    qkv: Sequence[nn.Module]
    output: nn.Module
    gate_up: Sequence[nn.Module]
    down: nn.Module
    norms: tuple[Tensor, Tensor]
    head_norms: HeadNorms | None = None


class Model(NamedTuple):
    """A Llama-like model's parts.

    Attributes
    ----------
    sizes : Architecture
    blocks : sequence of Block
    norm : (hidden,) float32 tensor
    embedding, head : module
    """

    sizes: Architecture
    blocks: Sequence[Block]
    norm: Tensor
    embedding: nn.Module
    head: nn.Module


def parts_of(model: Any, dtype: torch.dtype) -> Model:
    """The parts of a loaded model: its tensors where they lie, but for copies of those of other dtypes.

    Raises
    ------
    NotDecodableError
        If the engine cannot run the model.
    """
    sizes = architecture(model.config.to_dict() if hasattr(model, "config") else {}, FUSED_TYPES)
    head = model.lm_head
    if getattr(head, "bias", None) is not None:
        raise NotDecodableError("its head has a bias")
    inner, embedding = model.model, model.model.embed_tokens
    if type(embedding) not in (nn.Embedding, QuantizedEmbedding) or type(head) not in (nn.Linear, QuantizedHead):
        raise NotDecodableError(f"its embedding is a {type(embedding).__name__} and its head a {type(head).__name__}")
    blocks = [block_of(layer, dtype) for layer in inner.layers]
    return Model(sizes, blocks, weight_of(inner.norm), embedding, in_dtype(head, dtype))


def block_of(layer: Any, dtype: torch.dtype) -> Block:
    """The parts of one block."""
    found = [in_dtype(layer.get_submodule(name), dtype) for name in PROJECTIONS]
    first, second = (weight_of(layer.get_submodule(name)) for name in NORMS)
    query, key = (getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm"))
    norms = HeadNorms(weight_of(query), weight_of(key)) if query is not None else None
    return Block(found[:3], found[3], found[4:6], found[6], (first, second), norms)


def weight_of(norm: Any) -> Tensor:
    """The weight of a norm in float32."""
    return norm.weight.detach().float()


def in_dtype(module: Any, dtype: torch.dtype) -> nn.Module:
    """A layer that takes and gives a dtype.

    Raises
    ------
    NotDecodableError
        If it is of another kind than packed, dense, or a head of 8 or 4 bits.
    """
    if isinstance(module, PackedLinear | QuantizedHead):
        return module
    if type(module) is not nn.Linear:
        raise NotDecodableError(f"a layer of it is a {type(module).__name__}")
    if module.weight.dtype == dtype:
        return module
    made = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    made.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
    if module.bias is not None:
        made.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    return made


class Modules:
    """Layers that share their input, as modules, one after the other.

    Parameters
    ----------
    modules : sequence of modules
    steps : TorchSteps or CudaSteps
    """

    def __init__(self, modules: Sequence[nn.Module], steps: Any):
        self.modules, self.steps = modules, steps

    def normed(self, stream: Stream, weight: Tensor) -> Tensor:
        """The outputs side by side, (rows, sum of d_out), of the stream's RMSNorm."""
        self.input = x = self.steps.normed(stream, weight)
        return self.modules[0](x) if len(self.modules) == 1 else torch.cat([each(x) for each in self.modules], -1)

    def latents(self) -> tuple[Tensor, list[Spans]]:
        """What the packed layers' first stages make of the last input of `normed`: see Packed."""
        found, spans, begin = [], [], 0
        for each in self.modules:
            ranks = each.ranks if isinstance(each, PackedLinear) else ()
            spans.append(Spans.at(begin, ranks))
            begin += kept_width(ranks)
            if isinstance(each, PackedLinear):
                found.append(stored_latents(latents(self.input, each.factors()), ranks))
        return torch.cat(found, -1)[None], spans

    def added(self, x: Tensor, stream: Stream, activation: str | None = None) -> None:
        """Add the only layer's output to the stream; with an activation, x holds gate and up side by side."""
        x = x.to(self.steps.dtype)
        self.steps.added(self.modules[0](self.steps.gated(x, activation) if activation else x), stream)


class Packed:
    """Packed layers that share their input, as two launches; used like Modules.

    Parameters
    ----------
    modules : sequence of PackedLinear
    batch : int
    eps : float
        Of RMSNorm.
    """

    def __init__(self, modules: Sequence[PackedLinear], batch: int, eps: float):
        from ..kernels.cuda_layer import FusedProjections

        self.siblings = FusedProjections([[tensor for path in each.factors() for tensor in path] for each in modules])
        self.d_outs, self.rows, self.eps = [each.d_out for each in modules], batch, eps
        self.use(self.siblings.launch_config(batch))
        self.bias = None
        if any(each.bias is not None for each in modules):
            device = modules[0].factors()[0].h.device
            biases = [torch.zeros(each.d_out, device=device) if each.bias is None else each.bias for each in modules]
            self.bias = torch.cat([each.float() for each in biases])

    def use(self, schedule: Any) -> None:
        """Launch by a schedule; None if there is none, and the layers cannot be launched together."""
        from ..kernels.cuda_layer import output_blocks
        from ..kernels.cuda_schedule import k_tiles_of

        self.schedule, slices = schedule, k_tiles_of(self.siblings.shape.d_in)
        self.parts = -(-slices // -(-slices // schedule.split_k)) if schedule else 0
        self.blocks = output_blocks(self.d_outs[0], schedule) if schedule else 0

    def part(self, rows: int, device: torch.device) -> Tensor:
        """Room for what the first kernel hands to the second."""
        return torch.empty(self.siblings.latent_size(rows, self.schedule), device=device)  # type: ignore[arg-type]

    def normed(self, stream: Stream, weight: Tensor) -> Tensor:
        """As that of Modules, in float32."""
        rows, device = len(stream.x), stream.x.device
        y = torch.empty(rows, sum(self.d_outs), device=device)
        norm = weight, stream.squares, stream.squares.shape[1], self.eps
        self.between = self.part(rows, device)
        self.siblings.launch(stream.x, y, self.between, self.schedule, norm=norm, bias=self.bias)
        return y

    def latents(self) -> tuple[Tensor, list[Spans]]:
        """What the first kernel of the last `normed` made, (parts, rows, columns), and where each layer's is."""
        from ..kernels.cuda_schedule import padded_rank

        spans, begin = [], 0
        for ranks in self.siblings.shape.ranks:
            spans.append(Spans.at(begin, ranks, padded_rank))
            begin += sum(map(padded_rank, ranks))
        return self.between.view(-1, self.rows, begin)[: self.parts], spans

    def added(self, x: Tensor, stream: Stream, activation: str | None = None) -> None:
        """As that of Modules, in place; x may also be the shares that `CudaSteps.attend` leaves."""
        from ..kernels.cuda_gemv import SUMMARY, SplitKvPartials

        rows, device = len(stream.x), stream.x.device
        squares = torch.empty(rows, self.blocks, device=device)
        shares = SplitKvPartials(x.shape[2], x.shape[3] - SUMMARY) if x.ndim == 4 else None
        self.siblings.launch(
            x.float(),  # dense layers before this one give their own dtype
            stream.x,
            self.part(rows, device),
            self.schedule,
            activation=activation,
            squares=squares,
            split_kv=shares,
        )
        stream.squares = squares


class FusedEngine:
    """A model, and keys and values for a batch of sequences; see decode_cuda.Engine.

    Sequences have positions of their own, so prompts of any lengths begin at the first one.

    Parameters
    ----------
    model : Model
    batch, capacity : int
    device : torch.device
    dtype : torch.dtype
        Of keys and values, and of what dense layers are multiplied with.
    kernels : bool, optional
        Whether Numba's kernels run the steps; by default on a GPU.

    Raises
    ------
    NotDecodableError
        If the kernels cannot be used, or not for such sizes.
    """

    def __init__(
        self,
        model: Model,
        batch: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        kernels: bool | None = None,
    ):
        sizes, self.kernels = model.sizes, device.type == "cuda" if kernels is None else kernels
        self.model, self.batch, self.capacity, self.device, self.dtype = model, batch, capacity, device, dtype
        self.heads = Heads(sizes.heads, sizes.kv_heads, sizes.head_dim)
        self.steps: Any = (
            CudaSteps(self.heads, dtype, sizes.eps, batch, device)
            if self.kernels
            else TorchSteps(self.heads, dtype, sizes.eps)
        )
        self.groups = [self.groups_of(block) for block in model.blocks]
        self.positions = torch.zeros(batch, dtype=torch.int64, device=device)
        self.angles = self.angles_of(capacity)
        self.make_cache(capacity)

    def make_cache(self, capacity: int) -> None:
        """Keys and values of all layers, (layers, batch, kv_heads, capacity, size)."""
        shape = len(self.model.blocks), self.batch, self.heads.kv_heads, capacity, self.heads.size
        self.keys, self.values = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))

    def pretend(self, count: int) -> None:
        """Go on as if so many tokens of each sequence had been read, of which random numbers are kept: to be timed."""
        self.positions.fill_(count)
        for kept in (self.keys, self.values):
            kept[..., :count, :].normal_()

    @property
    def token_bytes(self) -> int:
        """Bytes that are kept of a token."""
        return (self.keys.nbytes + self.values.nbytes) // (self.batch * self.capacity)

    @property
    def larger(self) -> int:
        """The capacity to grow to."""
        return 2 * self.capacity

    def groups_of(self, block: Block) -> tuple[Modules | Packed, ...]:
        """A block's layers in the order in which they run."""
        return tuple(
            self.group_of(modules, adds)
            for modules, adds in (
                (block.qkv, False),
                ([block.output], True),
                (block.gate_up, False),
                ([block.down], True),
            )
        )

    def group_of(self, modules: Sequence[Any], adds: bool) -> Modules | Packed:
        """Layers that share their input: two launches, if they can be."""
        if not self.kernels or len(modules) > MOST_SIBLINGS:
            return Modules(modules, self.steps)
        if not all(isinstance(each, PackedLinear) and len(each.ranks) <= MOST_PATHS for each in modules):
            return Modules(modules, self.steps)
        packed = Packed(modules, self.batch, self.model.sizes.eps)
        return packed if packed.schedule and not (adds and packed.bias is not None) else Modules(modules, self.steps)

    def angles_of(self, capacity: int) -> Tensor:
        """Cosines and sines of so many positions."""
        return torch.from_numpy(rotary_angles(self.model.sizes.rope, self.heads.size, capacity)).to(self.device)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (batch, vocabulary) after one more token of each sequence."""
        steps, model = self.steps, self.model
        stream = steps.embed(tokens, model.embedding)
        for at, (block, (qkv, output, gate_up, down)) in enumerate(zip(model.blocks, self.groups, strict=True)):
            output.added(self.attend(at, qkv.normed(stream, block.norms[0])), stream)
            down.added(gate_up.normed(stream, block.norms[1]), stream, "silu")
        self.positions.add_(1)
        return steps.logits(steps.normed(stream, model.norm), model.head)

    def pieces(self, at: int) -> dict[str, Callable[[], Any]]:
        """What `step` does in block `at`, to be timed: GROUPS and "attention", each on numbers of its own."""
        block, groups, sizes = self.model.blocks[at], self.groups[at], self.model.sizes
        x = torch.randn(self.batch, sizes.hidden, device=self.device)
        squares = x.square().sum(-1, keepdim=True)
        streams = [Stream(x.clone(), squares) for _ in groups]
        projected, wide = (groups[i].normed(streams[i], norm) for i, norm in zip((0, 2), block.norms, strict=True))
        mixed = self.attend(at, projected)
        calls = (
            lambda: groups[0].normed(streams[0], block.norms[0]),
            lambda: groups[1].added(mixed, streams[1]),
            lambda: groups[2].normed(streams[2], block.norms[1]),
            lambda: groups[3].added(wide, streams[3], "silu"),
        )
        return dict(zip(GROUPS, calls, strict=True)) | {"attention": lambda: self.attend(at, projected)}

    def attend(self, at: int, projected: Tensor) -> Tensor:
        """Attention of one new token of each sequence in layer `at`: (batch, heads * size), or its shares."""
        kept, norms = (self.keys[at], self.values[at]), self.model.blocks[at].head_norms
        return self.steps.attend(projected, *kept, self.positions, self.angles, norms, self.whole(at))

    def whole(self, at: int) -> bool:
        """Whether what comes after the attention of layer `at` cannot put shares of it together."""
        return not isinstance(self.groups[at][1], Packed)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits (batch, vocabulary) after the prompts, a block of tokens after the other, shorter ones filled up."""
        lengths = [len(prompt) for prompt in prompts]
        rows = torch.tensor([list(prompt) + [0] * (max(lengths) - len(prompt)) for prompt in prompts])
        last: list[Any] = [None] * len(prompts)
        for start, x in self.prefilled(rows.to(self.device)):
            for row, length in enumerate(lengths):
                if start < length <= start + x.shape[1]:
                    last[row] = x[row, length - 1 - start]
        self.positions.copy_(torch.tensor(lengths))
        stream = torch.stack(last)
        plain = TorchSteps(self.heads, self.dtype, self.model.sizes.eps)
        return self.model.head(plain.normed(Stream(stream, stream.square().sum(-1, keepdim=True)), self.model.norm))

    def prefilled(self, tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
        """For each block of tokens, where it starts, and the residual stream after it, (batch, tokens, hidden)."""
        plain = TorchSteps(self.heads, self.dtype, self.model.sizes.eps)
        for start in range(0, tokens.shape[1], PREFILL):
            stream = plain.embed(tokens[:, start : start + PREFILL], self.model.embedding)
            for at, block in enumerate(self.model.blocks):
                x = plain.normed(stream, block.norms[0])
                projected = torch.cat([each(x) for each in block.qkv], -1)
                plain.added(block.output(self.attend_block(at, x, projected, start)), stream)
                x = plain.normed(stream, block.norms[1])
                wide = torch.cat([each(x) for each in block.gate_up], -1)
                plain.added(block.down(plain.gated(wide, "silu")), stream)
            yield start, stream.x

    def attend_block(self, at: int, x: Tensor, projected: Tensor, start: int) -> Tensor:
        """Attention of a block of new tokens in layer `at`, projected from x: (batch, tokens, heads * size)."""
        end, norms = start + projected.shape[1], self.model.blocks[at].head_norms
        cosine, sine = self.angles[:, start:end, None]
        parts = split_heads(projected, self.heads, norms, self.model.sizes.eps, cosine, sine)
        query, key, value = (part.transpose(1, 2).to(self.dtype) for part in parts)
        self.keys[at, :, :, start:end], self.values[at, :, :, start:end] = key, value
        seen = torch.ones(end - start, end, dtype=torch.bool, device=self.device).tril(start) if start else None
        mixed = functional.scaled_dot_product_attention(
            query,
            self.keys[at, :, :, :end],
            self.values[at, :, :, :end],
            attn_mask=seen,
            is_causal=seen is None,
            enable_gqa=True,
        )
        return mixed.transpose(1, 2).flatten(2)

    def grow(self, capacity: int) -> None:
        """Make room for more tokens."""
        self.grow_cache(capacity)
        self.angles, self.capacity = self.angles_of(capacity), capacity

    def grow_cache(self, capacity: int) -> None:
        """Make room for more tokens' keys and values."""
        room = (0, 0, 0, capacity - self.capacity)
        self.keys, self.values = functional.pad(self.keys, room), functional.pad(self.values, room)
