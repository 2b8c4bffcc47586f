"""The latent key-value cache: latents, how they are stored, and attention over them."""

import numpy as np
from hypothesis import strategies as st
from littlebit.reference import Factors, PackedFactors

from .. import exact
from ..backend import Backend
from ..compare import assert_same, assert_true, assert_within
from ..law import Draw, laws_of
from ..strategies import generators
from .packing import packed_exactly

LAWS, law = laws_of("latent_cache")
LATENTS = "LittleBit (arXiv 2506.13771), latent key-value cache"
ROPE = "Su et al. (arXiv 2104.09864), pairs of entries i and i + size / 2"
STORED = ("float32", "float16", "int8")
EPS = float(np.finfo(np.float32).eps)


def random_paths(rng: np.random.Generator, d_out: int, d_in: int, ranks: list[int]) -> list[PackedFactors]:
    """Make packed paths with normal latents and scales."""
    shapes = [((d_out, rank), (d_in, rank), (d_out,), (rank,), (d_in,)) for rank in ranks]
    return [packed_exactly(Factors(*(rng.standard_normal(s).astype(np.float32) for s in each))) for each in shapes]


def some_paths(backend: Backend, draw: Draw) -> list[PackedFactors]:
    """Draw one or two packed paths."""
    most = min(40, backend.declared("LARGEST"))
    ranks = draw(st.lists(st.integers(1, most), min_size=1, max_size=2))
    return random_paths(draw(generators()), draw(st.integers(1, 9)), draw(st.integers(1, most)), ranks)


@law("latents", source=LATENTS)
def latents_are_the_down_projection(backend: Backend, draw: Draw) -> None:
    """T = ell * (V_sign^T (g * x)) in float32, all paths side by side."""
    paths = some_paths(backend, draw)
    x = draw(generators()).standard_normal((3, len(paths[0].g))).astype(np.float32)
    a, _ = exact.down_and_up(paths)
    assert_within(backend.latents(x, paths), x @ a.T, np.abs(x) @ np.abs(a).T, a.shape[1] + 3)


@law("up_projection", source=LATENTS)
def up_projection_is_h_times_u(backend: Backend, draw: Draw) -> None:
    """The up-projection is [h * U_sign] of all paths side by side, in float32, exactly."""
    paths = some_paths(backend, draw)
    assert_same(backend.up_projection(paths), exact.down_and_up(paths)[1].astype(np.float32))


@law("round_latents", source=LATENTS)
def stored_latents_are_within_their_bound(backend: Backend, draw: Draw) -> None:
    """Codes times scale is off by at most scale / 2 in int8, |t| 2^-11 + scale 2^-25 in float16, at any size of t."""
    dtype, exponent = draw(st.sampled_from(STORED)), draw(st.integers(-30, 30))
    t = (draw(generators()).standard_normal((4, 9)) * 10.0**exponent).astype(np.float32)
    stored = backend.round_latents(t, dtype)
    assert_true(str(stored.codes.dtype) == dtype, f"codes of {stored.codes.dtype} instead of {dtype}")
    scale = stored.scale.astype(np.float64)
    bound = {
        "float32": 0 * t,
        "float16": np.abs(t) * 2.0**-11 + scale * 2.0**-25,
        "int8": np.broadcast_to(scale / 2, t.shape),
    }[dtype]
    size = np.abs(t) + bound
    assert_within(exact.latent_values(stored).astype(np.float32), t, size, terms=2, slack=bound)


@law("round_latents", source=LATENTS)
def largest_latent_uses_the_whole_range(backend: Backend, draw: Draw) -> None:
    """The largest magnitude of a token has the code 127 in int8 and 1 in float16."""
    dtype, largest = draw(st.sampled_from([("int8", 127), ("float16", 1)]))
    t = draw(generators()).standard_normal((3, 5)).astype(np.float32)
    codes = backend.round_latents(t, dtype).codes
    assert_same(np.abs(codes.astype(np.float32)).max(axis=1), np.full(3, largest, np.float32))


@law("round_latents", source=LATENTS)
def zero_tokens_stay_zero(backend: Backend, draw: Draw) -> None:
    """A token of zeros has codes of 0 and a scale of 1."""
    t = np.ones((2, 3), np.float32)
    t[0] = 0
    stored = backend.round_latents(t, draw(st.sampled_from(STORED)))
    assert_same(stored.codes[0].astype(np.float32), np.zeros(3, np.float32))
    assert_same(stored.scale[0].astype(np.float32), np.ones(1, np.float32))


@law("apply_rope", source=ROPE)
def rope_multiplies_complex_numbers(backend: Backend, draw: Draw) -> None:
    """Entries i and i + size / 2 are the real and imaginary part of a number, multiplied by cosine + i sine."""
    half = draw(st.integers(1, 8))
    rng = draw(generators())
    x, cosine, sine = (rng.standard_normal((3, size)).astype(np.float32) for size in (2 * half, half, half))
    wide = [each.astype(np.float64) for each in (x, cosine, sine)]
    assert_within(backend.apply_rope(x, cosine, sine), exact.turned(*wide), exact.turned_magnitude(*wide), terms=3)


@st.composite
def attentions(draw):
    """Draw sizes, inputs and layers of one attention over some tokens."""
    rng = draw(generators())
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size, d_in = draw(st.sampled_from([2, 4, 8])), draw(st.integers(1, 20))
    tokens = draw(st.integers(1, 20))
    queries = draw(st.integers(1, tokens))
    ranks = [draw(st.lists(st.integers(1, 10), min_size=1, max_size=2)) for _ in "kv"]
    keys, values = (random_paths(rng, kv_heads * size, d_in, each) for each in ranks)
    biases = [rng.standard_normal(kv_heads * size).astype(np.float32) if draw(st.booleans()) else None for _ in "kv"]
    x = (rng.standard_normal((tokens, d_in)) * 10.0 ** draw(st.integers(-3, 1))).astype(np.float32)
    query = rng.standard_normal((kv_heads * group, queries, size)).astype(np.float32)
    angles = rng.uniform(0, 100, (tokens, size // 2))
    turn = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    hidden = draw(st.integers(0, tokens))  # padding on the left
    mask = np.tril(np.ones((queries, tokens), bool), tokens - queries) & (np.arange(tokens) >= hidden)
    return exact.Attention(x, query, keys, values, biases, turn, mask)


@law("latents", "round_latents", "latent_attention", source=LATENTS)
def attention_over_latents_is_attention(backend: Backend, draw: Draw) -> None:
    """Attention over stored latents is attention over whole keys and values, but for storage and rounding."""
    case, dtype = draw(attentions()), draw(st.sampled_from(STORED))
    value, bound = exact.attention(case, dtype)
    paths = case.key_paths, case.value_paths
    kept = [backend.round_latents(backend.latents(case.x, each), dtype) for each in paths]
    found = backend.latent_attention(case.query, *kept, *paths, *case.turn, case.mask, *case.biases)
    assert_within(found, value, bound / EPS, terms=1, factor=1)
