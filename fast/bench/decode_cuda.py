"""Benchmark decoding on a GPU: a packed model, a float16 model in the same engine, and transformers.

Models of published shapes get random weights. Packed layers are made of random words, without a dense weight, so any
model whose packed form fits the GPU can be timed.
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
from ..decoding.graph_decoder import DecodeLoop, copy_to_host_async
from ..memory import MODEL_SHAPES, ModelShape, layer_ranks, linear_shapes, model_memory
from ..models.embeddings import QuantizedEmbedding, QuantizedHead
from ..models.layers import PackedLinear
from .linear import random_path
from .linear_cuda import copy_bytes_per_second
from .tune import replay_seconds

log = logging.getLogger(__name__)
WARM_TOKENS = 4  # steps before the timed ones: the first runs without a graph, the second captures it
EAGER_TOKENS = 32  # timed steps of transformers
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
    """Time greedy decoding of a random model of a published shape.

    A step replays one CUDA graph, from one token of each sequence to the next. The result is the median of `tokens`
    steps, by CUDA events between the replays. transformers runs the same shape in float16, eagerly, with its dynamic
    cache.

    Parameters
    ----------
    shape : str
        A name in MODEL_SHAPES.
    bits : sequence of float
        Most stored bits per weight of the linear layers.
    paths : int
        Paths of each packed layer.
    contexts : sequence of int
        Tokens in the cache before the timed steps. The engines' caches are filled with random numbers
        (`FusedEngine.fill_cache_with_random`).
    batch : int
        Sequences.
    tokens : int
        Timed steps.
    peers : bool
        Also time the same engine with dense float16 layers, and transformers, where they fit the GPU.
    profile : bool
        Also time each group of kernels, see `profile_step`.
    kv_caches : sequence of str
        Types of cache of the packed models, in memory.KV_CACHES.

    Returns
    -------
    One dict for each model, context and type of cache that fits the GPU:

    - engine: "packed", "float16" or "transformers";
    - shape, paths, context, batch, tokens, kv_cache: the arguments;
    - bits: stored bits per weight of the linear layers;
    - kv_bytes_per_token: bytes of the cache for a token of one sequence;
    - time_ms: time of a step; tokens_per_s: all sequences together;
    - streamed_tokens_per_s: by the wall clock, while the host reads each token;
    - weights_bytes; step_bytes: bytes that a step must read, with the cache at the middle of the timed steps;
    - fraction_of_copy: step_bytes per second / bandwidth of a device-to-device copy (bytes read and written);
    - peak_bytes: the most that torch had allocated;
    - parts: the profile.

    Raises
    ------
    ValueError
        If the shape is unknown, or its model is not Llama-like.
    """
    sizes, copy_rate = llama_shape(shape), copy_bytes_per_second()
    common, rows = {"shape": shape, "batch": batch, "tokens": tokens}, []
    for target in (*bits, *([None] if peers else [])):
        cases = list(itertools.product(contexts, ["full"] if target is None else kv_caches))
        rows += bench_engine(sizes, target, paths, cases, batch, tokens, copy_rate, profile)
    for context in contexts if peers else ():
        if fits(sizes, None, paths, context + tokens, batch):
            found = timed_transformers(sizes, context, batch, copy_rate)
            rows.append({"context": context, "engine": "transformers", "bits": 16.0, "paths": None} | found)
    return [common | row for row in rows]


def bench_engine(
    sizes: ModelShape,
    bits: float | None,
    paths: int,
    cases: Sequence[tuple[int, str]],
    batch: int,
    tokens: int,
    copy_rate: float,
    profile: bool,
) -> list[dict[str, Any]]:
    """Time the engine on a random model, for each case (context, type of cache) that fits the GPU.

    The model is dense if bits is None. See `bench_decode_cuda` for other arguments and the rows.
    """
    cases = [case for case in cases if fits(sizes, bits, paths, case[0] + tokens, batch, case[1])]
    if not cases:
        return []
    model, rows = random_model(sizes, bits, paths), []
    engine = {"engine": "float16", "bits": 16.0, "paths": None}
    if bits is not None:
        engine = {"engine": "packed", "bits": stored_bits(sizes, bits, paths), "paths": paths}
    for context, kv_cache in cases:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        found = timed_engine(model, context, batch, tokens, copy_rate, profile, kv_cache)
        rows.append(engine | {"context": context} | found)
    del model
    torch.cuda.empty_cache()
    return rows


def bench_checkpoint_cuda(
    model: Any,
    contexts: Sequence[int] = (128,),
    batch: int = 1,
    tokens: int = 256,
    profile: bool = False,
    kv_caches: Sequence[str] = ("full",),
) -> list[dict[str, Any]]:
    """Time greedy decoding of a loaded model on a GPU; returns rows like `bench_decode_cuda`."""
    copy_rate, rows = copy_bytes_per_second(), []
    with torch.inference_mode():
        parts = parts_of(model, torch.float16)
    for context, kv_cache in itertools.product(contexts, kv_caches):
        found = timed_engine(parts, context, batch, tokens, copy_rate, profile, kv_cache)
        rows.append({"engine": "packed", "context": context, "batch": batch, "tokens": tokens} | found)
    return rows


def llama_shape(name: str) -> ModelShape:
    """Return the published shape of a Llama-like model.

    Raises
    ------
    ValueError
        If the name is unknown, or the model is not Llama-like.
    """
    known = [each for each, shape in MODEL_SHAPES.items() if shape.gated and not shape.fused]
    if name not in known:
        raise ValueError(f"the fused engine needs a Llama-like shape, got {name!r}: choose one of {', '.join(known)}")
    return MODEL_SHAPES[name]


def stored_bits(shape: ModelShape, bits: float, paths: int) -> float:
    """Compute the stored bits per weight of the linear layers."""
    ranks, shapes = layer_ranks(shape, bits, paths, WORD_BITS), linear_shapes(shape)
    return sum(layer_bits(d_out, d_in, ranks[name]) for name, (d_out, d_in) in shapes.items()) / sum(
        map(math.prod, shapes.values())
    )


def fits(shape: ModelShape, bits: float | None, paths: int, tokens: int, batch: int, kv_cache: str = "full") -> bool:
    """Check whether a model and its cache fit the GPU's free memory; log a warning if they do not."""
    memory = model_memory(shape, bits, paths, context=tokens * batch, kv_cache=kv_cache)
    needed, (free, _) = memory.total, torch.cuda.mem_get_info()
    if needed < 0.95 * free:
        return True
    name = f"{'float16' if bits is None else f'{bits:g} bits'} with {tokens} tokens in its {kv_cache} cache"
    log.warning("littlebit: skipping %s: it needs %.1f GB, and %.1f GB are free", name, needed / 1e9, free / 1e9)
    return False


def random_model(shape: ModelShape, bits: float | None, paths: int = 1, device: str = "cuda") -> Model:
    """Make a model of random packed words, or of random dense float16 weights if bits is None.

    Weights are scaled so that activations keep the size of a trained model's. Dense layers that share their input are
    one module.
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
    numbers = shape.hidden, shape.heads, shape.kv_heads, shape.head_size, shape.intermediate, shape.layers
    sizes = Architecture(*numbers, shape.vocabulary, 1e-5, rope, shape.context)
    head = random_linear(shape.vocabulary, shape.hidden, generator)
    rows = head if shape.tied else random_linear(shape.vocabulary, shape.hidden, generator)
    embedding = nn.Embedding(1, 1, device="meta")
    embedding.weight = rows.weight
    return Model(sizes, blocks, one, embedding, head)


def random_linear(d_out: int, d_in: int, generator: torch.Generator, bias: bool = False) -> nn.Linear:
    """Make a dense float16 layer whose outputs are about as large as its inputs."""
    layer = nn.Linear(d_in, d_out, bias=bias, device="meta")
    weight = torch.empty(d_out, d_in, dtype=torch.float16, device=generator.device)
    layer.weight = nn.Parameter(weight.normal_(0, d_in**-0.5, generator=generator), requires_grad=False)
    if bias:
        layer.bias = nn.Parameter(torch.zeros(d_out, dtype=torch.float16, device=generator.device), requires_grad=False)
    return layer


def random_packed(
    d_out: int, d_in: int, ranks: Sequence[int], generator: torch.Generator, bias: bool = False
) -> PackedLinear:
    """Make a packed layer whose outputs are about as large as its inputs."""
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
    """Time an engine's steps; returns the measured fields of `bench_decode_cuda`."""
    with torch.inference_mode():
        engine = engine_of(model, batch, context + tokens + WARM_TOKENS, model.norm.device, torch.float16, kv_cache)
        loop = DecodeLoop(engine)
        begin(engine, loop, context)
        seconds = step_seconds(loop.advance, tokens)
        begin(engine, loop, context)
        streamed = streamed_seconds(loop, tokens)
        parts = profile_step(engine, loop) if profile else None
    weights, cached = weights_bytes(model), engine.token_bytes * batch * (context + tokens // 2)
    step_bytes = weights + cached - unread_bytes(model, batch)
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
    """Measure the median time in seconds between the ends of consecutive steps on the device."""
    for _ in range(WARM_TOKENS):
        step()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    events[-1].synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events)) / 1e3


def begin(engine: FusedEngine, loop: DecodeLoop, context: int) -> None:
    """Put a loop into the state after prompts of `context` tokens, without a prefill: random numbers fill the cache."""
    engine.fill_cache_with_random(context)
    loop.length = context


def streamed_seconds(loop: DecodeLoop, tokens: int) -> float:
    """Measure a step's seconds by the wall clock, while the host reads each token as `decode_steps` does."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(tokens):
        arrived = copy_to_host_async(loop.tokens)
        loop.advance()
        arrived()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / tokens


def module_bytes(module: Any) -> int:
    """Sum the bytes of a layer's tensors."""
    if isinstance(module, QuantizedEmbedding | QuantizedHead):
        return sum(tensor.nbytes for tensor in module.table.buffers())
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def modules_of(block: Block) -> list[nn.Module]:
    """List all linear layers of a block."""
    return [*block.qkv, block.output, *block.gate_up, block.down]


def weights_bytes(model: Model) -> int:
    """Sum the bytes of all weights, with norms in float16 as they are stored, and tied tables once."""
    linear = sum(module_bytes(module) for block in model.blocks for module in modules_of(block))
    tables = {first_tensor(each).data_ptr(): module_bytes(each) for each in (model.embedding, model.head)}
    norms = 2 * model.norm.numel() * (2 * len(model.blocks) + 1)
    return linear + sum(tables.values()) + norms


def first_tensor(module: Any) -> Tensor:
    """Return the table of an embedding or head."""
    return module.table.codes if isinstance(module, QuantizedEmbedding | QuantizedHead) else module.weight


def unread_bytes(model: Model, batch: int) -> int:
    """Compute the bytes of weights that a step does not read: rows of an embedding that is not tied."""
    if first_tensor(model.embedding).data_ptr() == first_tensor(model.head).data_ptr():
        return 0
    size = module_bytes(model.embedding)
    return size - size // model.sizes.vocabulary * batch


def profile_step(engine: FusedEngine, loop: DecodeLoop) -> list[dict[str, Any]]:
    """Time each group of a step's kernels, for all layers, as a graph of its own.

    Returns
    -------
    One dict for each group: part, calls, time_us (a call), step_us (all calls of a step). They add up to more than a
    step takes, because in a step a kernel starts before the previous one ends.
    """
    ops, model = engine.ops, engine.model
    embedded = ops.embed(loop.tokens, model.embedding)
    hidden = ops.rms_norm(embedded, model.norm)
    blocks = [engine.block_calls(at) for at in range(len(model.blocks))]
    parts: dict[str, list[Callable[[], Any]]] = {
        "embedding": [lambda: ops.embed(loop.tokens, model.embedding)],
        **{part: [calls[part] for calls in blocks] for part in blocks[0]},
        "last norm": [lambda: ops.rms_norm(embedded, model.norm)],
        "head": [lambda: ops.logits(hidden, model.head)],
        "choice": [lambda: loop.tokens.copy_(ops.logits(hidden, model.head).argmax(-1))],
    }
    rows = []
    for part, calls in parts.items():
        seconds = replay_seconds(calls)
        row = {"part": part, "calls": len(calls), "time_us": 1e6 * seconds, "step_us": 1e6 * seconds * len(calls)}
        rows.append(row)
    rows[-1]["time_us"] = rows[-1]["step_us"] = max(
        0.0, rows[-1]["step_us"] - rows[-2]["step_us"]
    )  # "choice" ran the head too
    return rows


def timed_transformers(shape: ModelShape, context: int, batch: int, copy_rate: float) -> dict[str, Any]:
    """Time transformers on a random Llama of a shape; returns the measured fields of `bench_decode_cuda`."""
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
    cached = 4 * shape.layers * shape.kv_heads * shape.head_size * batch * (context + EAGER_TOKENS // 2)
    return {
        "kv_cache": "full",
        "kv_bytes_per_token": 4 * shape.layers * shape.kv_heads * shape.head_size,
        "time_ms": 1e3 * seconds,
        "tokens_per_s": batch / seconds,
        "streamed_tokens_per_s": None,
        "weights_bytes": weights,
        "step_bytes": weights - embedding + cached,
        "fraction_of_copy": (weights - embedding + cached) / seconds / copy_rate,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }
