"""Signs in words: exact, for every row length."""

import numpy as np
from hypothesis import strategies as st
from littlebit.reference import Factors, PackedFactors

from .. import exact
from ..backend import Backend
from ..compare import assert_same, assert_true
from ..law import Draw, laws_of
from ..strategies import WORD_EDGES, generators, layers, sign_arrays, sizes, strided

LAWS, law = laws_of("packing")
SIGNS = "packed format, section Signs"
PATHS = "packed format, section Paths"
LONGEST = 130


@law("pack_signs", source=SIGNS)
def sign_j_is_bit_j(backend: Backend, draw: Draw) -> None:
    """Sign j of a row is bit j % w of word j // w, the least significant bit first; bit 1 means -1."""
    signs = draw(sign_arrays(LONGEST))
    words, expected = backend.pack_signs(signs), exact.pack(signs)
    assert_same(bits_of(words)[..., : signs.shape[-1]], bits_of(expected)[..., : signs.shape[-1]])


@law("pack_signs", source=SIGNS)
def words_are_the_narrowest(backend: Backend, draw: Draw) -> None:
    """A row of n signs takes one 8-bit word if n <= 8, one 16-bit word if n <= 16, else ceil(n / 32) 32-bit words."""
    signs = draw(sign_arrays(LONGEST))
    words, expected = backend.pack_signs(signs), exact.pack(signs)
    assert_true(
        8 * words.itemsize == 8 * expected.itemsize and words.dtype.kind in "iu",
        f"words of {words.dtype} instead of {expected.dtype} for a row of {signs.shape[-1]} signs",
    )
    assert_true(words.shape == expected.shape, f"words of shape {words.shape} instead of {expected.shape}")


@law("pack_signs", source=SIGNS)
def pad_bits_are_zero(backend: Backend, draw: Draw) -> None:
    """The bits after the last sign of a row are 0."""
    count = draw(st.sampled_from(WORD_EDGES))
    bits = bits_of(backend.pack_signs(-np.ones((2, count), np.float32)))
    assert_same(bits.sum(axis=-1, dtype=np.int64), np.full(2, count))


@law("pack_signs", source=SIGNS)
def zero_is_positive(backend: Backend, draw: Draw) -> None:
    """0.0 and -0.0 are packed as +1, bit 0."""
    zeros = draw(st.lists(st.sampled_from([0.0, -0.0, 1.0]), min_size=1, max_size=40))
    words = backend.pack_signs(np.array(zeros, np.float32))
    assert_same(words, np.zeros_like(words))


@law("pack_signs", source=SIGNS)
def nan_is_not_packed(backend: Backend, draw: Draw) -> None:
    """NaN has no sign: packing it raises ValueError."""
    signs = draw(sign_arrays(40, batches=[(), (2,)])).copy()
    signs[..., draw(st.integers(0, signs.shape[-1] - 1))] = np.nan
    assert_refused(lambda: backend.pack_signs(signs), "NaN was packed")


@law("unpack_signs", source=SIGNS)
def unpacking_reads_every_sign(backend: Backend, draw: Draw) -> None:
    """Unpacking words gives their signs, as floats of -1 and +1, for any batch shape and strides."""
    signs = draw(sign_arrays(LONGEST))
    found = backend.unpack_signs(strided(draw, exact.pack(signs)), signs.shape[-1])
    assert_true(np.issubdtype(found.dtype, np.floating), f"signs of {found.dtype} instead of floats")
    assert_same(found.astype(np.float32), signs)


@law("pack_signs", "unpack_signs", source=SIGNS)
def unpacking_is_the_inverse_of_packing(backend: Backend, draw: Draw) -> None:
    """Unpacking what was packed gives the same signs."""
    signs = draw(sign_arrays(LONGEST))
    assert_same(backend.unpack_signs(backend.pack_signs(signs), signs.shape[-1]).astype(np.float32), signs)


@law("unpack_signs", source=SIGNS)
def damaged_words_are_refused(backend: Backend, draw: Draw) -> None:
    """Unpacking raises ValueError if a pad bit is set."""
    count = draw(st.sampled_from([size for size in WORD_EDGES if size not in (8, 16, 32, 64)]))
    words = exact.pack(draw(generators()).choice([1.0, -1.0], (2, count)))
    width = 8 * words.itemsize
    pad = draw(st.integers(count % width, width - 1))
    words[1, -1] |= words.dtype.type(1) << words.dtype.type(pad)
    assert_refused(lambda: backend.unpack_signs(words, count), f"words with pad bit {pad} set were unpacked")


@law("unpack_signs", source=SIGNS)
def other_words_are_refused(backend: Backend, draw: Draw) -> None:
    """Unpacking raises ValueError for words of a wrong number or width."""
    count = draw(sizes(70))
    words = exact.pack(draw(generators()).choice([1.0, -1.0], (2, count)))
    other = [f"uint{width}" for width in (8, 16, 32) if width != 8 * words.itemsize]
    if draw(st.booleans()):
        wrong = np.concatenate([words, np.zeros_like(words)], axis=-1)
    else:
        wrong = np.zeros(words.shape, draw(st.sampled_from(other)))
    assert_refused(lambda: backend.unpack_signs(wrong, count), f"{wrong.shape} {wrong.dtype} was unpacked")


@law("pack_factors", source=PATHS)
def u_is_packed_along_the_rank_and_v_along_d_in(backend: Backend, draw: Draw) -> None:
    """Row i of u_words packs the rank signs of row i of U, row k of v_words the d_in signs of column k of V."""
    for path in draw(layers(min(40, backend.declared("LARGEST")))):
        packed = backend.pack_factors(path)
        assert_same(packed.u_words, exact.pack(path.u))
        assert_same(packed.v_words, exact.pack(path.v.T))


@law("pack_factors", source=PATHS)
def scales_are_rounded_to_float16(backend: Backend, draw: Draw) -> None:
    """h, ell and g are stored in float16, rounded to the nearest, ties to even."""
    (path,) = draw(layers(20, most=1))
    power = 2.0 ** draw(st.integers(-22, 10))
    path = path._replace(h=path.h * np.float32(power), ell=path.ell + np.float32(2.0**-11), g=path.g)
    packed = backend.pack_factors(path)
    for name in ("h", "ell", "g"):
        assert_same(getattr(packed, name), getattr(path, name).astype(np.float16))


@law("pack_factors", source=PATHS)
def scales_beyond_float16_are_refused(backend: Backend, draw: Draw) -> None:
    """Packing raises ValueError if a scale is not finite in float16."""
    (path,) = draw(layers(8, most=1))
    name = draw(st.sampled_from(["h", "ell", "g"]))
    scale = getattr(path, name).copy()
    scale[-1] = draw(st.sampled_from([1e5, -1e5, np.inf, np.nan]))
    path = path._replace(**{name: scale})
    assert_refused(lambda: backend.pack_factors(path), f"a scale {name} of {scale[-1]} was packed")


@law("unpack_factors", source=PATHS)
def unpacked_paths_are_what_is_stored(backend: Backend, draw: Draw) -> None:
    """Unpacking a path gives U (d_out, rank) and V (d_in, rank) of -1 and +1, and the stored scales in float32."""
    for path in draw(layers(min(40, backend.declared("LARGEST")))):
        packed = packed_exactly(path)
        found = backend.unpack_factors(packed)
        assert_same(found.u, exact.signs_of(path.u).astype(np.float32))
        assert_same(found.v, exact.signs_of(path.v).astype(np.float32))
        for name in ("h", "ell", "g"):
            assert_same(getattr(found, name), getattr(packed, name).astype(np.float32))


def packed_exactly(path: Factors) -> PackedFactors:
    """Pack a path sign by sign."""
    halves = (scale.astype(np.float16) for scale in (path.h, path.ell, path.g))
    return PackedFactors(exact.pack(path.u), exact.pack(path.v.T), *halves)


def bits_of(words: np.ndarray) -> np.ndarray:
    """List all bits of each row of words, pad bits included."""
    octets = np.ascontiguousarray(words, words.dtype.newbyteorder("<")).view(np.uint8)
    return np.unpackbits(octets, axis=-1, bitorder="little")


def assert_refused(call, message: str) -> None:
    """Require that a call raises ValueError."""
    try:
        call()
    except ValueError:
        return
    raise AssertionError(f"{message}, where ValueError must be raised")
