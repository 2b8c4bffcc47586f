"""The fused engine with a latent key-value cache (see kv_cache.py): R numbers a token and projection instead of d_kv.

What the first stage of k_proj and v_proj makes of a token is kept. Keys are expanded in the kernel that multiplies them
with the query (kernels/cuda_latent_attention.py). The values' latents are summed with their weights first, and the sum
is expanded once. Memory is what the cache is for, so it grows by BLOCK tokens instead of by its size.
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
from .ops import kept_width, split_heads, stored_latents, used_latents

BLOCK = 2048  # tokens that the cache grows by


class LatentEngine(FusedEngine):
    """A model, and latents for a batch of sequences.

    Parameters
    ----------
    model, batch, capacity, device, dtype, kernels
        See FusedEngine.
    kind : str
        "latent" (float16) or "latent-int8".

    Raises
    ------
    NotDecodableError
        If a k_proj or v_proj is not packed, or its rank too large, or keys have biases or norms between the latent and
        the rotation.
    """

    def __init__(
        self,
        model: Model,
        batch: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        kernels: bool | None = None,
        kind: str = "latent",
    ):
        self.pairs = [packed_pair(block) for block in model.blocks]
        self.type = LATENT_TYPES[kind]
        super().__init__(model, batch, capacity, device, dtype, kernels)
        self.expansions = [self.steps.expansions(pair) for pair in self.pairs]

    def make_cache(self, capacity: int) -> None:
        """Latents of keys and values of each layer: codes (batch, capacity, kept width), scale (batch, capacity, 1)."""
        shape = self.batch, capacity
        self.cache = [
            [
                Latents(
                    torch.zeros(*shape, kept_width(each.ranks), dtype=self.type, device=self.device),
                    torch.ones(*shape, 1, device=self.device),
                )
                for each in pair
            ]
            for pair in self.pairs
        ]

    def pretend(self, count: int) -> None:
        """As that of FusedEngine."""
        self.positions.fill_(count)
        for codes, _ in itertools.chain.from_iterable(self.cache):
            codes[:, :count].random_(-127, 128)

    @property
    def token_bytes(self) -> int:
        """Bytes that are kept of a token."""
        tensors = itertools.chain.from_iterable(itertools.chain.from_iterable(self.cache))
        return sum(tensor.nbytes for tensor in tensors) // (self.batch * self.capacity)

    @property
    def larger(self) -> int:
        """The capacity to grow to."""
        return (self.capacity // BLOCK + 1) * BLOCK

    def attend(self, at: int, projected: Tensor) -> Tensor:
        """As that of FusedEngine."""
        part, spans = self.groups[at][0].latents()
        kept = part, spans[1:], self.cache[at], self.expansions[at]
        return self.steps.attend_latents(projected, *kept, self.positions, self.angles, self.whole(at))

    def attend_block(self, at: int, x: Tensor, projected: Tensor, start: int) -> Tensor:
        """Attention of a block of new tokens in layer `at`, whose latents are kept: (batch, tokens, heads * size)."""
        end, kept = start + projected.shape[1], []
        key, value = layers = self.pairs[at]
        for layer, (codes, scale) in zip(layers, self.cache[at], strict=True):
            new = round_latents(stored_latents(latents(x, layer.factors()), layer.ranks), self.type)
            codes[:, start:end], scale[:, start:end] = new
            kept.append(used_latents(Latents(codes[:, :end], scale[:, :end]), layer.ranks))
        turned = self.angles[:, start:end, None]
        query, _, _ = split_heads(projected, self.heads, None, self.model.sizes.eps, *turned)
        seen = torch.ones(1, end - start, end, dtype=torch.bool, device=self.device).tril(start)
        paths, (cosine, sine) = (key.factors(), value.factors()), self.angles[:, :end]
        query = query.transpose(1, 2)
        mixed = latent_attention(query, kept[0], kept[1], *paths, cosine, sine, seen, value_bias=value.bias)
        return mixed.transpose(1, 2).flatten(2).to(projected.dtype)

    def grow_cache(self, capacity: int) -> None:
        """Make room for more tokens' latents."""
        more = 0, 0, 0, capacity - self.capacity
        self.cache = [
            [Latents(functional.pad(codes, more), functional.pad(scale, more, value=1.0)) for codes, scale in pair]
            for pair in self.cache
        ]


def packed_pair(block: Block) -> tuple[PackedLinear, PackedLinear]:
    """A block's k_proj and v_proj.

    Raises
    ------
    NotDecodableError
        If what they give cannot be kept as latents.
    """
    _, key, value = block.qkv if len(block.qkv) == 3 else (None, None, None)
    if not isinstance(key, PackedLinear) or not isinstance(value, PackedLinear):
        raise NotDecodableError("a latent cache needs k_proj and v_proj as packed layers of their own")
    if key.bias is not None or block.head_norms is not None:
        raise NotDecodableError("its keys get a bias or a norm before they are rotated, which latents are not made for")
    return key, value
