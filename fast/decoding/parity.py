"""Does the compiled decoder say what transformers says? The same greedy text, and logits within a derived bound.

transformers runs a dense twin of the packed model: the same numbers, multiplied out in float64 and rounded once.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

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
NOISE = 2.0**-30  # far above float64's rounding, far below what changes a well-conditioned result


def dense_twin(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A copy of a packed model with dense layers, embedding and head of the same values, for transformers to run."""
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
    """Exact logits of token sequences, and how far those of a float32 computation may lie from them.

    |error| <= 2 n eps M: n roundings of an entry, at most the terms of all sums on its way from embedding to logits;
    M how far the largest logit of a position moves per unit of relative noise in the weights, the largest logit itself
    included, as measured in float64 with a few draws of noise.

    Parameters
    ----------
    model : packed transformers model
    tokens : sequence of (length,) int64 tensors
    draws : int

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
    """Terms of all sums that a logit has on its way: each layer's inputs and ranks, the positions, the head."""
    layers = packed_layers(model).values()
    return model.config.hidden_size + sum(layer.d_in + sum(layer.ranks) + length for layer in layers)


def transformers_greedy(model: Any, prompt: Tensor, count: int) -> tuple[list[int], list[np.ndarray]]:
    """`count` tokens after a prompt (length,) by transformers with its cache, and the logits that chose each."""
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


def decoder_greedy(model: Any, prompt: Tensor, count: int) -> tuple[list[int], list[np.ndarray]]:
    """The same by the compiled decoder."""
    decoder = Decoder(decodable(model), len(prompt) + count)
    tokens, logits = [], [decoder(prompt.numpy()).copy()]
    for left in range(count - 1, -1, -1):
        tokens.append(int(logits[-1].argmax()))
        if left:
            logits.append(decoder(np.array(tokens[-1:])).copy())
    return tokens, logits


def agreement(
    model: Any, tokenizer: Any, prompts: Sequence[str] = PROMPTS, count: int = 256, progress: bool = True
) -> list[dict[str, Any]]:
    """Greedy texts of the compiled decoder and of transformers in float32 with the same weights, compared.

    Both go on to the last token; where a model ends its text, the text goes on.

    Parameters
    ----------
    model : packed transformers model that the decoder can run
    tokenizer : its tokenizer
    prompts : sequence of str
    count : int
        New tokens for each.
    progress : bool

    Returns
    -------
    One dict per prompt: prompt, tokens (new), same (how many are equal before the first that differs), gap (of the two
    likeliest tokens' exact logits: where the texts part, else the smallest), error and transformers_error (largest
    distance of a logit from its exact value while the texts are the same), bound_share (the larger of the two over
    the bound of its position).
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
    for at, (start, mine, theirs) in enumerate(pairs):
        same = next((k for k, (a, b) in enumerate(zip(mine[0], theirs[0], strict=True)) if a != b), count)
        seen = min(same + 1, count)  # logits of the same text
        true, bound = (each[len(start) - 1 :][:seen].numpy() for each in (exact[at], bounds[at]))
        errors = [np.abs(np.stack(logits[:seen]) - true).max(-1) for _, logits in (mine, theirs)]
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
