"""Compare the compiled decoder with transformers: equal greedy texts, and logits within a derived bound.

transformers runs a dense twin of the packed model: the same weights, multiplied out in float64 and rounded once.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...reference.arrays import Array
from .._checks import check_number, check_positions, flat_tokens, positions_of
from ..factors import Factors
from ..models.build import transformers
from ..models.embeddings import QuantizedEmbedding, QuantizedHead
from ..models.hf_names import cache_argument
from ..models.quantize import packed_layers, replace_module
from ..packing import unpack_factors
from .cpu_decoder import Decoder
from .torch_weights import decodable

PROMPTS = (
    "Once upon a time, in a small town by the sea,",
    "The capital of France is",
    "def fibonacci(n):",
    "In 1969 the first people walked on the Moon.",
    "The three states of matter are",
    "Dear Sir or Madam,",
    "To make bread you need flour, water,",
    "The history of the railway began",
    "Question: why is the sky blue?\nAnswer:",
    "She opened the old wooden door and",
)
NOISE = 2.0**-30  # relative noise: far above float64's rounding, and small enough for a linear response


def dense_twin(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Copy a packed model with dense layers, embedding and head of equal values, for transformers to run."""
    packed = packed_layers(model)
    skipped = {id(layer): layer for layer in packed.values()}  # shared, not copied: they are replaced
    model = copy.deepcopy(model, skipped)
    for name, layer in packed.items():
        linear = nn.Linear(layer.d_in, layer.d_out, bias=layer.bias is not None, dtype=dtype)
        factors = [Factors(*(part.double() for part in unpack_factors(path))) for path in layer.factors()]
        linear.weight.data = torch.stack([path.to_dense() for path in factors]).sum(0).to(dtype)
        if layer.bias is not None:
            linear.bias.data = layer.bias.to(dtype)
        replace_module(model, name, linear)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, QuantizedEmbedding):
        model.set_input_embeddings(nn.Embedding.from_pretrained(embedding.table.rows(slice(None)).to(dtype)))
    if isinstance(head, QuantizedHead):
        rows = head.table.rows(slice(None)).to(dtype)
        dense = nn.Linear(rows.shape[1], rows.shape[0], bias=False, dtype=dtype)
        dense.weight.data = rows
        model.set_output_embeddings(dense)
    return model.to(dtype).eval()


def logit_bound(model: Any, tokens: Sequence[Tensor], draws: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """Compute exact logits of token sequences, and a bound on the error of a float32 computation.

    |error| <= 2 n eps M. n is the number of roundings on the way from embedding to logits, at most the terms of all
    sums (`rounding_terms`). M is the larger of a position's largest logit and of its largest change per unit of
    relative noise in the weights, measured in float64 with a few draws of noise.

    Parameters
    ----------
    model : packed transformers model
    tokens : sequence of (length,) int64 tensors
    draws : int
        Draws of noise.

    Returns
    -------
    exact : list of (length, vocabulary) float64 tensors; bound : list of (length,) float64 tensors.
    """
    twin, generator = dense_twin(model, torch.float64), torch.Generator().manual_seed(0)
    with torch.inference_mode():
        exact = [twin(each[None]).logits[0] for each in tokens]
        moved = [each.abs().amax(-1) for each in exact]
        originals = {name: parameter.clone() for name, parameter in twin.named_parameters()}
        for _ in range(draws):
            for name, parameter in twin.named_parameters():
                noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
                parameter.copy_(originals[name] * (1 + NOISE * noise))
            for at, each in enumerate(tokens):
                change = (twin(each[None]).logits[0] - exact[at]).abs().amax(-1) / NOISE
                moved[at] = torch.maximum(moved[at], change)
    terms = [rounding_terms(model, len(each)) for each in tokens]
    eps = torch.finfo(torch.float32).eps
    return exact, [2 * count * eps * each for count, each in zip(terms, moved, strict=True)]


def rounding_terms(model: Any, length: int) -> int:
    """Count the terms of all sums behind a logit: each layer's inputs and ranks, the positions, the head."""
    layers = packed_layers(model).values()
    return model.config.hidden_size + sum(layer.d_in + sum(layer.ranks) + length for layer in layers)


def transformers_greedy(model: Any, prompt: Tensor, count: int) -> tuple[list[int], list[Array]]:
    """Generate `count` tokens after a prompt (length,) by transformers; return them and each one's logits."""
    tokens, logits = [], []
    past = cache_argument(transformers().DynamicCache(config=model.config), model.forward)
    with torch.inference_mode():
        output = model(prompt[None], use_cache=True, **past)
        for left in range(count - 1, -1, -1):
            logits.append(output.logits[0, -1].float().numpy())
            tokens.append(int(logits[-1].argmax()))
            if left:
                last = torch.tensor([[tokens[-1]]])
                output = model(last, use_cache=True, **past)
    return tokens, logits


def decoder_greedy(model: Any, prompt: Tensor, count: int) -> tuple[list[int], list[Array]]:
    """Generate `count` tokens after a prompt (length,) by the compiled decoder; return them and each one's logits."""
    decoder = Decoder(decodable(model), len(prompt) + count)
    tokens, logits = [], [decoder(prompt.numpy()).copy()]
    for left in range(count - 1, -1, -1):
        tokens.append(int(logits[-1].argmax()))
        if left:
            logits.append(decoder(np.array(tokens[-1:])).copy())
    return tokens, logits


def measure_parity(
    model: Any, tokenizer: Any, prompts: Sequence[str] = PROMPTS, count: int = 256, progress: bool = True
) -> list[dict[str, Any]]:
    """Compare greedy texts and logits of the compiled decoder with transformers in float32 with the same weights.

    Both generate `count` tokens, also beyond a stop token.

    Parameters
    ----------
    model : packed transformers model that the decoder can run
    tokenizer : its tokenizer
    prompts : sequence of str
    count : int
        New tokens after each prompt.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    One dict per prompt:

    - prompt, and tokens (`count`);
    - same: number of equal tokens before the first difference;
    - gap: difference of the two largest exact logits at the first different token, or the smallest if all are equal;
    - error, transformers_error: largest error of a logit while the texts are equal;
    - bound_share: the larger of the two errors / `logit_bound` at its position.
    """
    check_number("count", count, low=1, whole=True)
    starts = [flat_tokens(tokenizer(prompt)["input_ids"], model) for prompt in prompts]
    for start in starts:
        check_positions(len(start) + count - 1, positions_of(model), f"a prompt with {count} new tokens")
    twin = dense_twin(model)
    pairs = []
    for start in tqdm(starts, desc="greedy", disable=not progress):
        pairs.append((start, decoder_greedy(model, start, count), transformers_greedy(twin, start, count)))
    del twin
    texts = [torch.cat([start, torch.tensor(tokens[:-1])]) for start, (tokens, _), _ in pairs]
    exact, bounds = logit_bound(model, texts)
    rows = []
    for at, (start, ours, theirs) in enumerate(pairs):
        same = next((k for k, (a, b) in enumerate(zip(ours[0], theirs[0], strict=True)) if a != b), count)
        seen = min(same + 1, count)  # logits that follow equal texts
        true, bound = (each[len(start) - 1 :][:seen].numpy() for each in (exact[at], bounds[at]))
        errors = [np.abs(np.stack(logits[:seen]) - true).max(-1) for _, logits in (ours, theirs)]
        likeliest = np.sort(true, -1)[:, -2:]
        gaps = likeliest[:, 1] - likeliest[:, 0]
        rows.append(
            {
                "prompt": prompts[at],
                "tokens": count,
                "same": same,
                "gap": float(gaps.min() if same == count else gaps[-1]),
                "error": float(errors[0].max()),
                "transformers_error": float(errors[1].max()),
                "bound_share": float((np.maximum(*errors) / bound).max()),
            }
        )
    return rows
