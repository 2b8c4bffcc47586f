"""Choose the next token from logits, in NumPy; graph_decoder.py does the same in torch on the GPU.

The steps and their order are transformers': repetition penalty, temperature, top_k, top_p, min_p.
"""

import numpy as np

from ...reference.arrays import Array
from ..models.generation_settings import GenerationConfig


def choose_token(logits: Array, config: GenerationConfig, seen: Array, generator: np.random.Generator) -> int:
    """Choose the next token: the likeliest one, or at a temperature above 0 a random one; mark it as seen.

    Parameters
    ----------
    logits : (vocabulary,) float32 array
        Overwritten where there is a repetition penalty.
    config : GenerationConfig
    seen : (vocabulary,) bool array
        Which tokens prompt and answer contain; updated.
    generator : numpy.random.Generator
        Not used in greedy decoding.
    """
    if config.repetition_penalty not in (None, 1):
        penalize_repetition(logits, seen, config.repetition_penalty)
    token = sample(logits, config, generator) if config.temperature else int(logits.argmax())
    seen[token] = True
    return token


def penalize_repetition(logits: Array, seen: Array, penalty: float) -> None:
    """Divide the positive logits of seen tokens by a penalty, and multiply the negative ones by it, in place.

    Keskar et al. (arXiv 1909.05858), section 4.1, in the form for logits of any sign that transformers uses.

    Parameters
    ----------
    logits : (vocabulary,) float32 array
    seen : (vocabulary,) bool array
    penalty : float
        Above 1 makes repetitions less likely.

    Examples
    --------
    >>> logits = np.array([2.0, -2.0, 2.0], np.float32)
    >>> penalize_repetition(logits, np.array([True, True, False]), 2.0)
    >>> logits
    array([ 1., -4.,  2.], dtype=float32)
    """
    some, factor = logits[seen], logits.dtype.type(penalty)
    logits[seen] = np.where(some < 0, some * factor, some / factor)


def sample(logits: Array, config: GenerationConfig, generator: np.random.Generator) -> int:
    """Draw a token from the candidates that `candidates` leaves."""
    tokens, probabilities = candidates(logits, config)
    return int(tokens[generator.choice(len(tokens), p=probabilities)])


def candidates(logits: Array, config: GenerationConfig) -> tuple[Array, Array]:
    """List the tokens that temperature, top_k, top_p and min_p leave, the likeliest first.

    Parameters
    ----------
    logits : (vocabulary,) float array
    config : GenerationConfig
        With a temperature above 0.

    Returns
    -------
    tokens : (n,) int64 array; probabilities : (n,) float64 array whose sum is 1.

    Examples
    --------
    >>> tokens, probabilities = candidates(np.log([0.1, 0.6, 0.3]), GenerationConfig(temperature=1.0, min_p=0.4))
    >>> tokens, probabilities.round(3)
    (array([1, 2]), array([0.667, 0.333]))
    """
    tokens = np.argsort(-logits, kind="stable")[: config.top_k or None]
    scores = logits[tokens].astype(np.float64) / (config.temperature or 1.0)
    weights = np.exp(scores - scores[0])  # the likeliest token's is 1
    count = len(tokens)
    if config.top_p is not None:
        probabilities = weights / weights.sum()
        before = probabilities.cumsum() - probabilities  # of the likelier tokens
        count = max(1, int((before < config.top_p).sum()))
    if config.min_p is not None:
        count = min(count, int((weights >= config.min_p).sum()))
    return tokens[:count], weights[:count] / weights[:count].sum()
