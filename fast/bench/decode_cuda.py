"""Benchmark of decoding on a GPU: a packed model beside a float16 one in the same engine, and beside transformers.

Models of published shapes are made of random numbers, packed layers directly from random words, so that a model of any
size can be timed that the GPU has room for; no dense weight of a packed layer is ever made.
"""

import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..bits import WORD_BITS, layer_bits
from ..decoding.architecture import Architecture
from ..decoding.engines import engine_of
from ..decoding.fused_llama import Block, FusedEngine, Model, parts_of
from ..decoding.graph_decoder import Loop, sent
from ..memory import MODEL_SHAPES, ModelShape, layer_ranks, linear_shapes, model_memory
from ..models.embeddings import QuantizedEmbedding, QuantizedHead
from ..models.layers import PackedLinear
from .linear import random_path
from .linear_cuda import copy_bytes_per_second
from .tune import replay_seconds

log = logging.getLogger(__name__)
WARM_TOKENS = 4  # steps before the first that is timed: one runs by itself, one is captured
EAGER_TOKENS = 32  # that transformers is timed for
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def bench_decode_cuda(
    shape: str = "llama2-7b",
    bits: Sequence[float] = (0.1, 0.55, 1.0),
    paths: int = 1,
    contexts: Sequence[int] = (128,),
    batch: int = 1,
    tokens: int = 256,
    peers: bool = True,
    profile: bool = False,
    kv_caches: Sequence[str] = ("full",),
) -> list[dict[str, Any]]:
    """Time greedy decoding of a random model of a published shape, one token of each sequence after the other.

    A step is a replay of one CUDA graph, from the last token to the next one; a figure is the median over `tokens` of
    them, by events between the replays. transformers runs the same shape in float16, eagerly, with its dynamic cache.

    Parameters
    ----------
    shape : str
        A name in MODEL_SHAPES.
    bits : sequence of float
        Ceilings in stored bits per weight.
    paths : int
        Of each packed layer.
    contexts : sequence of int
        Tokens of the prompts; ours are not read but pretended (FusedEngine.pretend).
    batch : int
        Sequences.
    tokens : int
        That are timed.
    peers : bool
        Also time the same engine with dense float16 layers, and transformers, where they fit the GPU.
    profile : bool
        Also say where a token's time goes, see `profiled`.
    kv_caches : sequence of str
        Of the packed models: kinds in memory.KV_CACHES.

    Returns
    -------
    One dict for each model, context and kind of cache that the GPU has room for: engine ("packed", "float16" or
    "transformers"), shape, bits (stored, of the linear layers), paths, context, batch, tokens, kv_cache,
    kv_bytes_per_token, time_ms (of a step), tokens_per_s (of all sequences), streamed_tokens_per_s (by the clock, with
    each token read by the host), weights_bytes, step_bytes (that a step must read, with the cache at the middle of the
    timed steps), fraction_of_copy (step_bytes per second over those of a device-to-device copy, read and written),
    peak_bytes (that torch had allocated), parts (of a profile).

    Raises
    ------
    ValueError
        If the shape is unknown, or not that of a Llama-like model.
    """
    sizes = llama_shape(shape)
    copy_rate = copy_bytes_per_second()
    common, rows = {"shape": shape, "batch": batch, "tokens": tokens}, []
    for target in (*bits, *([None] if peers else [])):
        kinds = ["full"] if target is None else kv_caches
        each = [
            (context, kind)
            for context, kind in itertools.product(contexts, kinds)
            if fits(sizes, target, paths, context + tokens, batch, kind)
        ]
        if not each:
            continue
        model = random_model(sizes, target, paths)
        of_model = common | {"engine": "float16", "bits": 16.0, "paths": None}
        if target is not None:
            of_model |= {"engine": "packed", "bits": stored_bits(sizes, target, paths), "paths": paths}
        for context, kind in each:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            found = timed_engine(model, context, batch, tokens, copy_rate, profile, kind)
            rows.append(of_model | {"context": context} | found)
        del model
        torch.cuda.empty_cache()
    for context in contexts if peers else ():
        if fits(sizes, None, paths, context + tokens, batch):
            found = timed_transformers(sizes, context, batch, copy_rate)
            rows.append(common | {"context": context, "engine": "transformers", "bits": 16.0, "paths": None} | found)
    return rows


def bench_checkpoint_cuda(
    model: Any,
    contexts: Sequence[int] = (128,),
    batch: int = 1,
    tokens: int = 256,
    profile: bool = False,
    kv_caches: Sequence[str] = ("full",),
) -> list[dict[str, Any]]:
    """Time greedy decoding of a loaded model on a GPU; as rows of `bench_decode_cuda`."""
    copy_rate, rows = copy_bytes_per_second(), []
    with torch.inference_mode():
        parts = parts_of(model, torch.float16)
    for context, kind in itertools.product(contexts, kv_caches):
        found = timed_engine(parts, context, batch, tokens, copy_rate, profile, kind)
        rows.append({"engine": "packed", "context": context, "batch": batch, "tokens": tokens} | found)
    return rows


def llama_shape(name: str) -> ModelShape:
    """A published shape.

    Raises
    ------
    ValueError
        If it is unknown, or not that of a Llama-like model.
    """
    known = [each for each, shape in MODEL_SHAPES.items() if shape.gated and not shape.fused]
    if name not in known:
        raise ValueError(f"the fused engine runs no model of shape {name!r}, only {', '.join(known)}")
    return MODEL_SHAPES[name]


def stored_bits(shape: ModelShape, bits: float, paths: int) -> float:
    """Bits per weight that the linear layers really store."""
    ranks, shapes = layer_ranks(shape, bits, paths, WORD_BITS), linear_shapes(shape)
    return sum(layer_bits(d_out, d_in, ranks[name]) for name, (d_out, d_in) in shapes.items()) / sum(
        map(math.prod, shapes.values())
    )


def fits(shape: ModelShape, bits: float | None, paths: int, tokens: int, batch: int, kv_cache: str = "full") -> bool:
    """Whether a model and its cache fit the GPU's free memory; a warning says so if they do not."""
    memory = model_memory(shape, bits, paths, context=tokens * batch, kv_cache=kv_cache)
    needed, (free, _) = memory.total, torch.cuda.mem_get_info()
    if needed < 0.95 * free:
        return True
    name = f"{'float16' if bits is None else f'{bits:g} bits'} with {tokens} tokens in its {kv_cache} cache"
    log.warning("littlebit: %s is left out: it takes %.1f GB, and %.1f GB are free", name, needed / 1e9, free / 1e9)
    return False


def random_model(shape: ModelShape, bits: float | None, paths: int = 1, device: str = "cuda") -> Model:
    """A model of random packed words, or for no bits of random dense float16 weights, with numbers of a trained size.

    Dense layers that share their input are one.
    """
    generator = torch.Generator(device).manual_seed(0)
    shapes = linear_shapes(shape)
    ranks = {} if bits is None else layer_ranks(shape, bits, paths, WORD_BITS)

    def linear(at: int, *names: str) -> nn.Module:
        (d_outs, (d_in, *_)) = zip(*(shapes[f"{at}.{name}"] for name in names), strict=True)
        biased = shape.biases == "qkv" and names[0] in QKV
        if bits is None:
            return random_linear(sum(d_outs), d_in, generator, biased)
        return random_packed(d_outs[0], d_in, ranks[f"{at}.{names[0]}"], generator, biased)

    def linears(at: int, *names: str) -> list[nn.Module]:
        return [linear(at, *names)] if bits is None else [linear(at, name) for name in names]

    one = torch.ones(shape.hidden, device=device)
    blocks = [
        Block(linears(at, *QKV), linear(at, "o_proj"), linears(at, *GATE_UP), linear(at, "down_proj"), (one, one))
        for at in range(shape.layers)
    ]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    kinds = shape.hidden, shape.heads, shape.kv_heads, shape.head_size, shape.intermediate, shape.layers
    sizes = Architecture(*kinds, shape.vocabulary, 1e-5, rope, shape.context)
    head = random_linear(shape.vocabulary, shape.hidden, generator)
    rows = head if shape.tied else random_linear(shape.vocabulary, shape.hidden, generator)
    embedding = nn.Embedding(1, 1, device="meta")
    embedding.weight = rows.weight
    return Model(sizes, blocks, one, embedding, head)


def random_linear(d_out: int, d_in: int, generator: torch.Generator, bias: bool = False) -> nn.Linear:
    """A dense float16 layer whose outputs are about as large as its inputs."""
    layer = nn.Linear(d_in, d_out, bias=bias, device="meta")
    weight = torch.empty(d_out, d_in, dtype=torch.float16, device=generator.device)
    layer.weight = nn.Parameter(weight.normal_(0, d_in**-0.5, generator=generator), requires_grad=False)
    if bias:
        layer.bias = nn.Parameter(torch.zeros(d_out, dtype=torch.float16, device=generator.device), requires_grad=False)
    return layer


def random_packed(
    d_out: int, d_in: int, ranks: Sequence[int], generator: torch.Generator, bias: bool = False
) -> PackedLinear:
    """A packed layer whose outputs are about as large as its inputs."""
    paths = [random_path(d_out, d_in, rank, generator) for rank in ranks]
    zeros = torch.zeros(d_out, dtype=torch.float16, device=generator.device) if bias else None
    return PackedLinear([path._replace(ell=path.ell * (d_in * sum(ranks)) ** -0.5) for path in paths], zeros)


def timed_engine(
    model: Model,
    context: int,
    batch: int,
    tokens: int,
    copy_rate: float,
    profile: bool = False,
    kv_cache: str = "full",
) -> dict[str, Any]:
    """What the engine takes for a step: the figures of `bench_decode_cuda`."""
    with torch.inference_mode():
        engine = engine_of(model, batch, context + tokens + WARM_TOKENS, model.norm.device, torch.float16, kv_cache)
        loop = Loop(engine)
        begin(engine, loop, context)
        seconds = step_seconds(loop.advance, tokens)
        begin(engine, loop, context)
        streamed = streamed_seconds(loop, tokens)
        parts = profiled(engine, loop) if profile else None
    weights, kept = weights_bytes(model), engine.token_bytes * batch * (context + tokens // 2)
    step_bytes = weights + kept - unread_bytes(model, batch)
    return {
        "kv_cache": kv_cache,
        "kv_bytes_per_token": engine.token_bytes,
        "time_ms": 1e3 * seconds,
        "tokens_per_s": batch / seconds,
        "streamed_tokens_per_s": batch / streamed,
        "weights_bytes": weights,
        "step_bytes": step_bytes,
        "fraction_of_copy": step_bytes / seconds / copy_rate,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    } | ({"parts": parts} if parts else {})


def step_seconds(step: Callable[[], Any], count: int) -> float:
    """Median seconds between the ends of steps that follow each other on the device."""
    for _ in range(WARM_TOKENS):
        step()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    events[-1].synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) / 1e3


def begin(engine: FusedEngine, loop: Loop, context: int) -> None:
    """Let a loop go on after prompts of so many tokens, which are not read: it is the steps that are timed."""
    engine.pretend(context)
    loop.length = context


def streamed_seconds(loop: Loop, tokens: int) -> float:
    """Seconds of a step by the clock, when the host reads each token while the next step runs, as `stream` does."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(tokens):
        arrived = sent(loop.tokens)
        loop.advance()
        arrived()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / tokens


def module_bytes(module: Any) -> int:
    """Bytes of a layer's tensors."""
    if isinstance(module, QuantizedEmbedding | QuantizedHead):
        return sum(tensor.nbytes for tensor in module.table.buffers())
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def modules_of(block: Block) -> list[nn.Module]:
    """All layers of a block."""
    return [*block.qkv, block.output, *block.gate_up, block.down]


def weights_bytes(model: Model) -> int:
    """Bytes of all weights: norms in two bytes each, as they are stored; tied tables once."""
    linear = sum(module_bytes(module) for block in model.blocks for module in modules_of(block))
    tables = {first_tensor(each).data_ptr(): module_bytes(each) for each in (model.embedding, model.head)}
    norms = 2 * model.norm.numel() * (2 * len(model.blocks) + 1)
    return linear + sum(tables.values()) + norms


def first_tensor(module: Any) -> Tensor:
    """The table of an embedding or head."""
    return module.table.codes if isinstance(module, QuantizedEmbedding | QuantizedHead) else module.weight


def unread_bytes(model: Model, batch: int) -> int:
    """Bytes of weights that a step does not read: rows of an embedding of its own."""
    if first_tensor(model.embedding).data_ptr() == first_tensor(model.head).data_ptr():
        return 0
    size = module_bytes(model.embedding)
    return size - size // model.sizes.vocabulary * batch


def profiled(engine: FusedEngine, loop: Loop) -> list[dict[str, Any]]:
    """Where a step's time goes: each group of kernels for all layers, as a graph of its own.

    Returns
    -------
    One dict for each group: part, calls, time_us (a call), step_us (all calls of a step). Their sum is not a step's
    time, in which kernels begin before the last has ended.
    """
    steps, model = engine.steps, engine.model
    embedded = steps.embed(loop.tokens, model.embedding)
    hidden = steps.normed(embedded, model.norm)
    every = [engine.pieces(at) for at in range(len(model.blocks))]
    parts: dict[str, list[Callable[[], Any]]] = {
        "embedding": [lambda: steps.embed(loop.tokens, model.embedding)],
        **{part: [pieces[part] for pieces in every] for part in every[0]},
        "last norm": [lambda: steps.normed(embedded, model.norm)],
        "head": [lambda: steps.logits(hidden, model.head)],
        "choice": [lambda: loop.tokens.copy_(steps.logits(hidden, model.head).argmax(-1))],
    }
    rows = []
    for part, calls in parts.items():
        seconds = replay_seconds(calls)
        row = {"part": part, "calls": len(calls), "time_us": 1e6 * seconds, "step_us": 1e6 * seconds * len(calls)}
        rows.append(row)
    rows[-1]["time_us"] = rows[-1]["step_us"] = max(0.0, rows[-1]["step_us"] - rows[-2]["step_us"])  # without the head
    return rows


def timed_transformers(shape: ModelShape, context: int, batch: int, copy_rate: float) -> dict[str, Any]:
    """What transformers takes for a step of a random Llama of the same shape."""
    from ..models.build import transformers
    from ..models.hf_names import cache_argument

    hf = transformers()
    config = hf.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
    )
    torch.cuda.reset_peak_memory_stats()
    with torch.device("cuda"):
        model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
    prompts = torch.randint(shape.vocabulary, (batch, context), generator=torch.Generator().manual_seed(0))
    past = cache_argument(hf.DynamicCache(config=model.config), model.forward)
    with torch.inference_mode():
        output = model(prompts.cuda(), use_cache=True, logits_to_keep=1, **past)

        def step() -> None:
            nonlocal output
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, use_cache=True, **past)

        seconds = step_seconds(step, EAGER_TOKENS)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    embedding = 0 if shape.tied else model.get_input_embeddings().weight.nbytes
    kept = 4 * shape.layers * shape.kv_heads * shape.head_size * batch * (context + EAGER_TOKENS // 2)
    return {
        "kv_cache": "full",
        "kv_bytes_per_token": 4 * shape.layers * shape.kv_heads * shape.head_size,
        "time_ms": 1e3 * seconds,
        "tokens_per_s": batch / seconds,
        "streamed_tokens_per_s": None,
        "weights_bytes": weights,
        "step_bytes": weights - embedding + kept,
        "fraction_of_copy": (weights - embedding + kept) / seconds / copy_rate,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }
