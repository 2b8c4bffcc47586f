"""Decode Llama-like models with a latent key-value cache: rank numbers per token and projection instead of d_kv.

The cache keeps what the first stages (V) of k_proj and v_proj compute of a token; DeepSeek calls this multi-head latent
attention (MLA). Keys are up-projected inside the attention kernel. Values are not: their latents are summed by softmax
weights, and the sum is up-projected once (kernels/cuda_latent_attention.py). kv_cache.py has the mathematics.

A latent cache is there to save memory, so it grows by BLOCK tokens instead of doubling.
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from ..kv_cache import Latents, latent_attention, latents, round_latents
from ..models.layers import PackedLinear
from .architecture import NotDecodableError
from .fused_llama import Block, FusedEngine, Model
from .latent_cache import LATENT_TYPES
from .ops import pad_latents, padded_width, unpad_latents
from .torch_ops import split_heads

BLOCK = 2048  # tokens that the cache grows by


class LatentEngine(FusedEngine):
    """Run a Llama-like model on a batch of sequences, with a latent cache; implements `engines.Engine`.

    Parameters
    ----------
    model, batch, capacity, device, dtype, kernels
        See `FusedEngine`.
    kv_cache : str
        "latent" (float16) or "latent-int8".

    Raises
    ------
    NotDecodableError
        If k_proj or v_proj is not packed, its rank is too large for the kernels, or keys have a bias or a norm between
        their latents and RoPE.
    """

    def __init__(
        self,
        model: Model,
        batch: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        kernels: bool | None = None,
        kv_cache: str = "latent",
    ):
        self.pairs = [key_value_layers(block) for block in model.blocks]
        self.type = LATENT_TYPES[kv_cache]
        super().__init__(model, batch, capacity, device, dtype, kernels)
        self.up = [self.ops.up_projections(pair) for pair in self.pairs]

    def make_cache(self, capacity: int) -> None:
        """Allocate each layer's latents: codes (batch, capacity, padded width) and scale (batch, capacity, 1)."""
        shape = self.batch, capacity
        self.cache = [
            [
                Latents(
                    torch.zeros(*shape, padded_width(each.ranks), dtype=self.type, device=self.device),
                    torch.ones(*shape, 1, device=self.device),
                )
                for each in pair
            ]
            for pair in self.pairs
        ]

    def fill_cache_with_random(self, count: int) -> None:
        """Fill the first `count` cache positions with random numbers, to time decoding at that context length."""
        self.positions.fill_(count)
        for codes, _ in itertools.chain.from_iterable(self.cache):
            codes[:, :count].random_(-127, 128)

    @property
    def token_bytes(self) -> int:
        """Bytes that the cache takes for a token of one sequence."""
        tensors = itertools.chain.from_iterable(itertools.chain.from_iterable(self.cache))
        return sum(tensor.nbytes for tensor in tensors) // (self.batch * self.capacity)

    @property
    def next_capacity(self) -> int:
        """The capacity to grow to."""
        return (self.capacity // BLOCK + 1) * BLOCK

    def attend(self, at: int, projected: Tensor) -> Tensor:
        """Attend in layer `at` with one new token of each sequence; see `FusedEngine.attend`."""
        part, spans = self.groups[at][0].last_latents()
        cached = part, spans[1:], self.cache[at], self.up[at]
        return self.ops.attend_latents(projected, *cached, self.positions, self.angles, self.must_combine(at))

    def attend_block(self, at: int, x: Tensor, projected: Tensor, start: int) -> Tensor:
        """Attend in layer `at` with a block of new tokens, and cache their latents; see `FusedEngine.attend_block`."""
        end, cached = start + projected.shape[1], []
        key, value = layers = self.pairs[at]
        for layer, (codes, scale) in zip(layers, self.cache[at], strict=True):
            new = round_latents(pad_latents(latents(x, layer.factors()), layer.ranks), self.type)
            codes[:, start:end], scale[:, start:end] = new
            cached.append(unpad_latents(Latents(codes[:, :end], scale[:, :end]), layer.ranks))
        angles = self.angles[:, start:end, None]
        query, _, _ = split_heads(projected, self.heads, None, self.model.sizes.eps, *angles)
        seen = torch.ones(1, end - start, end, dtype=torch.bool, device=self.device).tril(start)
        paths, (cosine, sine) = (key.factors(), value.factors()), self.angles[:, :end]
        query = query.transpose(1, 2)
        mixed = latent_attention(query, cached[0], cached[1], *paths, cosine, sine, seen, value_bias=value.bias)
        return mixed.transpose(1, 2).flatten(2).to(projected.dtype)

    def grow_cache(self, capacity: int) -> None:
        """Enlarge the latents to a capacity."""
        more = 0, 0, 0, capacity - self.capacity
        self.cache = [
            [Latents(functional.pad(codes, more), functional.pad(scale, more, value=1.0)) for codes, scale in pair]
            for pair in self.cache
        ]


def key_value_layers(block: Block) -> tuple[PackedLinear, PackedLinear]:
    """Return a block's k_proj and v_proj.

    Raises
    ------
    NotDecodableError
        If a latent cache cannot hold their outputs.
    """
    _, key, value = block.qkv if len(block.qkv) == 3 else (None, None, None)
    if not isinstance(key, PackedLinear) or not isinstance(value, PackedLinear):
        raise NotDecodableError("a latent cache needs k_proj and v_proj as packed layers of their own")
    if key.bias is not None or block.head_norms is not None:
        raise NotDecodableError("its keys get a bias or a norm before RoPE, which a latent cache cannot hold")
    return key, value
