"""Decode Llama-like models with fused layers: nine kernels a layer.

    projected = qkv(rms_norm(x))       two kernels: V of q, k and v together, then U
    mixed = attend(projected)          one: RoPE, append key and value to the cache, attention
    x += o(mixed)                      two
    wide = gate_up(rms_norm(x))        two
    x += down(swiglu(wide))            two

Each kernel starts before the previous one ends (programmatic dependent launch). The residual stream x and everything
between kernels is float32; keys and values are float16. The prologue of a kernel applies the RMSNorm or SwiGLU while it
reads its input, and the epilogue of the kernel that writes x adds up its squares (kernels/cuda_gemv.py). Layers that
the packed kernels do not take, such as dense ones, run one by one, with kernels for what lies between them. On a CPU
torch runs everything.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..kv_cache import latents
from ..models.embeddings import QuantizedEmbedding, QuantizedHead
from ..models.layers import PackedLinear
from .architecture import MODEL_TYPES, NORMS, PROJECTIONS, Architecture, NotDecodableError, architecture, rotary_angles
from .cuda_ops import CudaOps
from .ops import DecoderOps, HeadNorms, Heads, ResidualStream, Spans, pad_latents, padded_width
from .torch_ops import TorchOps, split_heads, sum_of_squares

#: Model types that the engine runs: the CPU decoder's, and Qwen3, which has QK-norm.
FUSED_TYPES = (*MODEL_TYPES, "qwen3")


PREFILL_TOKENS = 512  # tokens of each prompt that pass through the model at once


MAX_PATHS, MAX_FUSED_LAYERS = 2, 3  # paths of a layer, and layers, that one launch of the packed kernels takes


GROUPS = ("qkv", "output", "gate, up", "down")  # names of a block's layer groups, in the order in which they run


class Block(NamedTuple):
    """The modules and norms of one transformer block.

    Attributes
    ----------
    qkv, gate_up : sequence of modules
        Layers that share their input, in this order: one module each, or one that computes several side by side.
    output, down : module
    norms : pair of (hidden,) float32 tensor
        RMSNorm weights before qkv and before gate_up.
    head_norms : HeadNorms, optional
    """

    qkv: Sequence[nn.Module]
    output: nn.Module
    gate_up: Sequence[nn.Module]
    down: nn.Module
    norms: tuple[Tensor, Tensor]
    head_norms: HeadNorms | None = None


class Model(NamedTuple):
    """The parts of a Llama-like model.

    Attributes
    ----------
    sizes : Architecture
    blocks : sequence of Block
    norm : (hidden,) float32 tensor
        Weight of the last RMSNorm.
    embedding, head : module
    """

    sizes: Architecture
    blocks: Sequence[Block]
    norm: Tensor
    embedding: nn.Module
    head: nn.Module


def parts_of(model: Any, dtype: torch.dtype) -> Model:
    """Take a loaded model apart, without a copy of tensors that have the wanted dtype already.

    Parameters
    ----------
    model : transformers causal language model
    dtype : torch.dtype
        Type of dense layers.

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
    """Take a transformer block apart; see `parts_of`."""
    found = [in_dtype(layer.get_submodule(name), dtype) for name in PROJECTIONS]
    first, second = (weight_of(layer.get_submodule(name)) for name in NORMS)
    query, key = (getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm"))
    norms = HeadNorms(weight_of(query), weight_of(key)) if query is not None else None
    return Block(found[:3], found[3], found[4:6], found[6], (first, second), norms)


def weight_of(norm: Any) -> Tensor:
    """Return the weight of a norm in float32."""
    return norm.weight.detach().float()


def in_dtype(module: Any, dtype: torch.dtype) -> nn.Module:
    """Return a linear layer whose dense weights have a dtype; packed layers take any.

    Raises
    ------
    NotDecodableError
        If the layer is neither packed, nor dense, nor a quantized head.
    """
    if isinstance(module, PackedLinear | QuantizedHead):
        return module
    if type(module) is not nn.Linear:
        raise NotDecodableError(f"one of its layers is a {type(module).__name__}, neither packed nor nn.Linear")
    if module.weight.dtype == dtype:
        return module
    made = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    made.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
    if module.bias is not None:
        made.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    return made


class LayerGroup(Protocol):
    """Run layers that share their input: q, k and v, or gate and up, or one layer alone."""

    def project(self, stream: ResidualStream, weight: Tensor) -> Tensor:
        """Compute the layers' outputs side by side, (rows, sum of d_out), of the stream's RMSNorm."""
        ...

    def last_latents(self) -> tuple[Tensor, list[Spans]]:
        """Return what the first stages (V) computed in the last call of `project`.

        Returns
        -------
        part : (parts, rows, columns) float32 tensor
            Split-K partials of the latents: the sum over parts counts.
        spans : list of Spans
            The columns of each layer's paths; none for a layer that is not packed.
        """
        ...

    def add_output(self, x: Tensor, stream: ResidualStream, activation: str | None = None) -> None:
        """Add the only layer's output to the stream.

        Parameters
        ----------
        x : (rows, d_in) tensor, (rows, 2 d_in) with an activation: gate and up side by side
        stream : ResidualStream
        activation : "silu", optional
            The layer's input is then silu(gate) * up.
        """
        ...


class ModuleGroup(LayerGroup):
    """Run layers that share their input as modules, one after the other.

    Parameters
    ----------
    modules : sequence of modules
    ops : DecoderOps
    """

    def __init__(self, modules: Sequence[nn.Module], ops: DecoderOps):
        self.modules, self.ops = modules, ops

    def project(self, stream: ResidualStream, weight: Tensor) -> Tensor:  # noqa: D102
        self.input = x = self.ops.rms_norm(stream, weight)
        return self.modules[0](x) if len(self.modules) == 1 else torch.cat([each(x) for each in self.modules], -1)

    def last_latents(self) -> tuple[Tensor, list[Spans]]:  # noqa: D102
        found, spans, begin = [], [], 0
        for each in self.modules:
            ranks = each.ranks if isinstance(each, PackedLinear) else ()
            spans.append(Spans.at(begin, ranks))
            begin += padded_width(ranks)
            if isinstance(each, PackedLinear):
                found.append(pad_latents(latents(self.input, each.factors()), ranks))
        return torch.cat(found, -1)[None], spans

    def add_output(self, x: Tensor, stream: ResidualStream, activation: str | None = None) -> None:  # noqa: D102
        x = x.to(self.ops.dtype)
        self.ops.add(self.modules[0](self.ops.swiglu(x) if activation else x), stream)


class PackedGroup(LayerGroup):
    """Run packed layers that share their input as one fused projection: two launches, in float32.

    Parameters
    ----------
    modules : sequence of PackedLinear
        At most MAX_FUSED_LAYERS, each of at most MAX_PATHS paths, on one GPU.
    batch : int
    eps : float
        Added to the mean square in RMSNorm.
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
        """Launch by a schedule from now on; None if the layers do not fit one launch."""
        from ..kernels.cuda_layer import output_blocks
        from ..kernels.cuda_schedule import k_tiles_of

        self.schedule, slices = schedule, k_tiles_of(self.siblings.shape.d_in)
        self.parts = -(-slices // -(-slices // schedule.split_k)) if schedule else 0
        self.blocks = output_blocks(self.d_outs[0], schedule) if schedule else 0

    def allocate_partials(self, rows: int, device: torch.device) -> Tensor:
        """Allocate the split-K partials that the first kernel hands to the second."""
        return torch.empty(self.siblings.latent_size(rows, self.schedule), device=device)  # type: ignore[arg-type]

    def project(self, stream: ResidualStream, weight: Tensor) -> Tensor:  # noqa: D102
        rows, device = len(stream.x), stream.x.device
        y = torch.empty(rows, sum(self.d_outs), device=device)
        norm = weight, stream.squares, stream.squares.shape[1], self.eps
        self.partials = self.allocate_partials(rows, device)
        self.siblings.launch(stream.x, y, self.partials, self.schedule, norm=norm, bias=self.bias)
        return y

    def last_latents(self) -> tuple[Tensor, list[Spans]]:  # noqa: D102
        from ..kernels.cuda_schedule import padded_rank

        spans, begin = [], 0
        for ranks in self.siblings.shape.ranks:
            spans.append(Spans.at(begin, ranks, padded_rank))
            begin += sum(map(padded_rank, ranks))
        return self.partials.view(-1, self.rows, begin)[: self.parts], spans

    def add_output(self, x: Tensor, stream: ResidualStream, activation: str | None = None) -> None:
        """Add the only layer's output to the stream in place; x may also be split-KV partials of `attend`."""
        from ..kernels.cuda_gemv import SUMMARY, SplitKvPartials

        rows, device = len(stream.x), stream.x.device
        squares = torch.empty(rows, self.blocks, device=device)
        shares = SplitKvPartials(x.shape[2], x.shape[3] - SUMMARY) if x.ndim == 4 else None
        self.siblings.launch(
            x.float(),  # dense layers before this one give their own dtype
            stream.x,
            self.allocate_partials(rows, device),
            self.schedule,
            activation=activation,
            squares=squares,
            split_kv=shares,
        )
        stream.squares = squares


class FusedEngine:
    """Run a Llama-like model on a batch of sequences, with a cache of keys and values; implements `engines.Engine`.

    Each sequence has a position of its own, so prompts of any lengths begin at position 0.

    Parameters
    ----------
    model : Model
    batch, capacity : int
        Sequences, and tokens of each that the cache has room for.
    device : torch.device
    dtype : torch.dtype
        Type of keys and values, and of the inputs of dense layers; float16 with kernels.
    kernels : bool, optional
        Whether CUDA kernels run instead of torch; by default on a GPU.

    Raises
    ------
    NotDecodableError
        If the kernels cannot run here, or not at these sizes.
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
        self.torch_ops = TorchOps(self.heads, dtype, sizes.eps)
        self.ops: DecoderOps = self.torch_ops
        if self.kernels:
            self.ops = CudaOps(self.heads, dtype, sizes.eps, batch, device)
        self.groups = [self.layer_groups(block) for block in model.blocks]
        self.positions = torch.zeros(batch, dtype=torch.int64, device=device)
        self.angles = self.angles_of(capacity)
        self.make_cache(capacity)

    def layer_groups(self, block: Block) -> tuple[ModuleGroup | PackedGroup, ...]:
        """Group a block's layers, in the order of GROUPS."""
        return tuple(
            self.layer_group(modules, adds)
            for modules, adds in (
                (block.qkv, False),
                ([block.output], True),
                (block.gate_up, False),
                ([block.down], True),
            )
        )

    def layer_group(self, modules: Sequence[Any], adds: bool) -> ModuleGroup | PackedGroup:
        """Fuse layers that share their input if the packed kernels can; `adds` if they add to the residual stream."""
        if not self.kernels or len(modules) > MAX_FUSED_LAYERS:
            return ModuleGroup(modules, self.ops)
        if not all(isinstance(each, PackedLinear) and len(each.ranks) <= MAX_PATHS for each in modules):
            return ModuleGroup(modules, self.ops)
        packed = PackedGroup(modules, self.batch, self.model.sizes.eps)
        return packed if packed.schedule and not (adds and packed.bias is not None) else ModuleGroup(modules, self.ops)

    def step(self, tokens: Tensor) -> Tensor:
        """Compute logits (batch, vocabulary) after one more token of each sequence, (batch,) int64."""
        ops, model = self.ops, self.model
        stream = ops.embed(tokens, model.embedding)
        for at, (block, (qkv, output, gate_up, down)) in enumerate(zip(model.blocks, self.groups, strict=True)):
            output.add_output(self.attend(at, qkv.project(stream, block.norms[0])), stream)
            down.add_output(gate_up.project(stream, block.norms[1]), stream, "silu")
        self.positions.add_(1)
        return ops.logits(ops.rms_norm(stream, model.norm), model.head)

    def attend(self, at: int, projected: Tensor) -> Tensor:
        """Attend in layer `at` with one new token of each sequence: (batch, heads * size), or split-KV partials."""
        cache, norms = (self.keys[at], self.values[at]), self.model.blocks[at].head_norms
        return self.ops.attend(projected, *cache, self.positions, self.angles, norms, self.must_combine(at))

    def must_combine(self, at: int) -> bool:
        """Check whether the output projection of layer `at` cannot combine split-KV partials."""
        return not isinstance(self.groups[at][1], PackedGroup)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Fill the cache with the prompts, PREFILL_TOKENS at a time; shorter prompts are padded on the right.

        Returns
        -------
        Logits (batch, vocabulary) after each prompt.
        """
        lengths = [len(prompt) for prompt in prompts]
        rows = torch.tensor([list(prompt) + [0] * (max(lengths) - len(prompt)) for prompt in prompts])
        last: list[Any] = [None] * len(prompts)
        for start, x in self.prefill_blocks(rows.to(self.device)):
            for row, length in enumerate(lengths):
                if start < length <= start + x.shape[1]:
                    last[row] = x[row, length - 1 - start]
        self.positions.copy_(torch.tensor(lengths))
        x = torch.stack(last)
        stream = ResidualStream(x, sum_of_squares(x))
        return self.model.head(self.torch_ops.rms_norm(stream, self.model.norm))

    def prefill_blocks(self, tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield each block's first position and the residual stream after it, (batch, tokens, hidden)."""
        ops = self.torch_ops
        for start in range(0, tokens.shape[1], PREFILL_TOKENS):
            stream = ops.embed(tokens[:, start : start + PREFILL_TOKENS], self.model.embedding)
            for at, block in enumerate(self.model.blocks):
                x = ops.rms_norm(stream, block.norms[0])
                projected = torch.cat([each(x) for each in block.qkv], -1)
                ops.add(block.output(self.attend_block(at, x, projected, start)), stream)
                x = ops.rms_norm(stream, block.norms[1])
                wide = torch.cat([each(x) for each in block.gate_up], -1)
                ops.add(block.down(ops.swiglu(wide)), stream)
            yield start, stream.x

    def attend_block(self, at: int, x: Tensor, projected: Tensor, start: int) -> Tensor:
        """Attend in layer `at` with a block of new tokens from position `start` on, and cache them.

        Parameters
        ----------
        at : int
        x : (batch, tokens, hidden) tensor
            Input of the projection.
        projected : (batch, tokens, (heads + 2 kv_heads) * size) tensor
        start : int

        Returns
        -------
        (batch, tokens, heads * size) tensor.
        """
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

    def make_cache(self, capacity: int) -> None:
        """Allocate keys and values of all layers, (layers, batch, kv_heads, capacity, size)."""
        shape = len(self.model.blocks), self.batch, self.heads.kv_heads, capacity, self.heads.size
        self.keys, self.values = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))

    @property
    def token_bytes(self) -> int:
        """Bytes that the cache takes for a token of one sequence."""
        return (self.keys.nbytes + self.values.nbytes) // (self.batch * self.capacity)

    @property
    def next_capacity(self) -> int:
        """The capacity to grow to."""
        return 2 * self.capacity

    def grow(self, capacity: int) -> None:
        """Enlarge the cache to a capacity, and keep what it holds."""
        self.grow_cache(capacity)
        self.angles, self.capacity = self.angles_of(capacity), capacity

    def grow_cache(self, capacity: int) -> None:
        """Enlarge keys and values to a capacity."""
        room = (0, 0, 0, capacity - self.capacity)
        self.keys, self.values = functional.pad(self.keys, room), functional.pad(self.values, room)

    def angles_of(self, capacity: int) -> Tensor:
        """Compute cosines and sines of RoPE, (2, capacity, size / 2) float32."""
        return torch.from_numpy(rotary_angles(self.model.sizes.rope, self.heads.size, capacity)).to(self.device)

    def fill_cache_with_random(self, count: int) -> None:
        """Fill the first `count` cache positions with random numbers, to time decoding at that context length."""
        self.positions.fill_(count)
        for cached in (self.keys, self.values):
            cached[..., :count, :].normal_()

    def block_calls(self, at: int) -> dict[str, Callable[[], Any]]:
        """Return what `step` runs in block `at`, to be timed: a call for each of GROUPS and for "attention".

        Every call has random inputs of its own.
        """
        block, groups, sizes = self.model.blocks[at], self.groups[at], self.model.sizes
        x = torch.randn(self.batch, sizes.hidden, device=self.device)
        streams = [ResidualStream(x.clone(), sum_of_squares(x)) for _ in groups]
        projected, wide = (groups[i].project(streams[i], norm) for i, norm in zip((0, 2), block.norms, strict=True))
        mixed = self.attend(at, projected)
        calls = (
            lambda: groups[0].project(streams[0], block.norms[0]),
            lambda: groups[1].add_output(mixed, streams[1]),
            lambda: groups[2].project(streams[2], block.norms[1]),
            lambda: groups[3].add_output(wide, streams[3], "silu"),
        )
        return dict(zip(GROUPS, calls, strict=True)) | {"attention": lambda: self.attend(at, projected)}
