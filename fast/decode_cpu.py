"""Generation on a CPU without Python between the layers: a Llama-like model as numbers for kernels/cpu_decode.py."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .embeddings import QuantizedEmbedding, QuantizedHead
from .kernels import cpu, cpu_decode
from .layers import PackedLinear

BLOCK = 32  # tokens of a prompt that pass through the model at once
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PROJECTIONS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
MODEL_TYPES = ("llama", "mistral", "qwen2")
STATIC_ROPE = ("default", "linear", "llama3")  # kinds whose frequencies do not depend on the length


def why_not(model: nn.Module) -> str | None:
    """Why `Decoder` cannot run a model, in a few words; None if it can."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in MODEL_TYPES:
        return f"model type {getattr(config, 'model_type', None)!r} is not one of {', '.join(MODEL_TYPES)}"
    if next(model.parameters()).device.type != "cpu":
        return "it is not on the CPU"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    uses_window = getattr(config, "use_sliding_window", config.model_type == "mistral")
    if uses_window and getattr(config, "sliding_window", None):
        return "it attends through a sliding window"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in STATIC_ROPE:
        return f"its rotary embedding is of type {rope!r}"
    inner: Any = model.model
    if head_size(config) % cpu.LANES or config.hidden_size % cpu.LANES or config.intermediate_size % cpu.LANES:
        return "its sizes are not multiples of sixteen"
    for layer in inner.layers:
        for name in PROJECTIONS:
            module = layer.get_submodule(name)
            if not isinstance(module, PackedLinear | nn.Linear):
                return f"{name} is a {type(module).__name__}"
            if isinstance(module, nn.Linear) and module.in_features % cpu.LANES:
                return "the sizes of its dense layers are not multiples of sixteen"
    if getattr(model.lm_head, "bias", None) is not None:
        return "its head has a bias"
    return None


def head_size(config: Any) -> int:
    """Entries of a key of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class Decoder:
    """A model's numbers, its keys and values, and the place where the next token goes.

    Parameters
    ----------
    model : transformers causal language model for which `why_not` is None
        Its tensors are used where they lie; those that are neither packed nor float32 are copied.
    capacity : int
        Tokens that it must hold at most, the prompt's included.
    """

    def __init__(self, model: Any, capacity: int):
        config, inner = model.config, model.model
        self.kept: list[Any] = []  # what the addresses point to
        size, layers = head_size(config), len(inner.layers)
        self.sizes = np.array(
            [
                config.hidden_size,
                config.num_attention_heads,
                config.num_key_value_heads,
                size,
                config.intermediate_size,
                layers,
                config.vocab_size,
                capacity,
            ]
        )
        self.eps = np.float32(config.rms_norm_eps)
        self.paths = np.empty((0, cpu.PATH_NUMBERS), np.int64)
        self.linears = np.array(
            [[self.linear(each.get_submodule(name)) for name in PROJECTIONS] for each in inner.layers]
        )
        norms = [norm for each in inner.layers for norm in (each.input_layernorm, each.post_attention_layernorm)]
        self.norms = np.array([self.address(norm.weight) for norm in [*norms, inner.norm]])
        self.embedding, self.head = self.table(inner.embed_tokens), self.table(model.lm_head)
        self.angles = rotary_angles(inner.rotary_emb, capacity)
        shape = layers, config.num_key_value_heads, capacity, size
        self.keys, self.values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.position = 0
        self.logits = np.empty(config.vocab_size, np.float32)

    def address(self, tensor: Tensor) -> int:
        """Address of a tensor's float32 values."""
        self.kept.append(tensor.detach().to(torch.float32).contiguous())
        return self.kept[-1].data_ptr()

    def linear(self, module: PackedLinear | nn.Linear) -> list[int]:
        """The numbers of a linear layer; a packed one's paths are appended to `paths`."""
        first, dense, count = len(self.paths), 0, 0
        if isinstance(module, PackedLinear):
            plan, kept = cpu.layer_plan(module.factors())
            self.kept.append(kept)
            self.paths = np.concatenate([self.paths, plan.reshape(-1, cpu.PATH_NUMBERS)])
            d_out, d_in, count = module.d_out, module.d_in, len(self.paths) - first
        else:
            d_out, d_in, dense = module.out_features, module.in_features, self.address(module.weight)
        return [first, count, d_out, d_in, 0 if module.bias is None else self.address(module.bias), dense]

    def table(self, module: Any) -> np.ndarray:
        """The numbers of an embedding or head."""
        if isinstance(module, QuantizedEmbedding | QuantizedHead):
            table = module.table
            self.kept.append(table.codes)
            offsets = 0 if table.offset is None else self.address(table.offset)
            return np.array([table.bits, table.codes.data_ptr(), self.address(table.scale), table.group, offsets])
        if module.weight.dtype == torch.float16:
            self.kept.append(module.weight.detach().contiguous())
            return np.array([16, self.kept[-1].data_ptr(), 0, 0, 0])
        return np.array([32, self.address(module.weight), 0, 0, 0])

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Logits (vocabulary,) after some more tokens, (n,) int64; the next call overwrites them.

        Raises
        ------
        ValueError
            If the tokens exceed the capacity, or are not the model's.
        """
        capacity, vocabulary = self.sizes[cpu_decode.CAPACITY], self.sizes[cpu_decode.VOCABULARY]
        if self.position + len(tokens) > capacity:
            raise ValueError(f"the decoder holds {capacity} tokens, not {self.position + len(tokens)}")
        if len(tokens) == 0 or tokens.min() < 0 or tokens.max() >= vocabulary:
            raise ValueError(f"tokens must be one or more numbers from 0 to {vocabulary - 1}, not {tokens}")
        with cpu.numba_threads() as threads:
            for start in range(0, len(tokens), BLOCK):
                block = np.ascontiguousarray(tokens[start : start + BLOCK], np.int64)
                cpu_decode.step(
                    self.sizes,
                    self.eps,
                    self.linears,
                    self.paths,
                    self.norms,
                    self.embedding,
                    self.head,
                    self.angles,
                    self.keys,
                    self.values,
                    block,
                    self.position,
                    self.logits,
                    threads,
                )
                self.position += len(block)
        return self.logits


def rotary_angles(module: Any, capacity: int) -> np.ndarray:
    """Cosines and sines of each position, (2, capacity, head size / 2) float32, computed as transformers does."""
    frequencies = torch.arange(capacity).float()[:, None] * module.inv_freq.float()
    return np.stack([(part * module.attention_scaling).numpy() for part in (frequencies.cos(), frequencies.sin())])


def decode(
    model: nn.Module,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: tuple[int, ...] = (),
) -> Iterator[int]:
    """New tokens after the prompt `tokens`, (length,), one by one; the last may be one of `stop`."""
    decoder = Decoder(model, len(tokens) + max_new_tokens)
    generator = torch.Generator().manual_seed(seed)
    logits = decoder(tokens.numpy())
    for left in range(max_new_tokens - 1, -1, -1):
        token = int(logits.argmax()) if temperature == 0 else sample(logits, temperature, top_k, top_p, generator)
        yield token
        if token in stop or not left:
            return
        logits = decoder(np.array([token]))


def sample(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """A token drawn at a temperature from the k likeliest, or from the likeliest that hold probability p, or both."""
    scores = torch.from_numpy(logits) / temperature
    scores, order = scores.sort(descending=True)
    scores = scores[: top_k or None]
    chances = torch.softmax(scores, -1)
    if top_p is not None:
        before = chances.cumsum(-1) - chances  # of the tokens that are likelier
        chances = chances[: max(1, int((before < top_p).sum()))]
    return int(order[torch.multinomial(chances, 1, generator=generator)])
