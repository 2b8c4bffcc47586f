"""Test that both backends pack signs into the documented words, and unpack every sign."""

import littlebit.fast as fast
import littlebit.reference as ref
import numpy as np
import pytest
import torch
from compare import assert_same
from hypothesis import given, strategies as st
from littlebit.conformance.strategies import factor_arrays, sizes

PRIMES = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 61, 67, 97, 101, 127, 131]


def random_signs(shape, seed=0):
    return np.where(np.random.default_rng(seed).random(shape) < 0.5, -1, 1).astype(np.float32)


def width_of(count):
    """Restate the rule: the narrowest words that hold a row."""
    return 8 if count <= 8 else 16 if count <= 16 else 32


@pytest.mark.parametrize("count", sorted({*range(1, 41), 63, 64, 65, *PRIMES}))
@pytest.mark.parametrize("batch", [(1,), (5,), (0,), (2, 3)])
def test_pack_signs_round_trip(count, batch):
    signs = random_signs((*batch, count))
    words = ref.pack_signs(signs)
    assert words.shape == (*batch, -(-count // width_of(count)))
    assert words.dtype == np.dtype(f"uint{width_of(count)}")
    assert_same(ref.unpack_signs(words, count), signs)
    fast_words = fast.pack_signs(torch.from_numpy(signs))
    assert fast_words.dtype == {8: torch.uint8, 16: torch.int16, 32: torch.int32}[width_of(count)]
    assert_same(fast_words, words)
    assert_same(fast.unpack_signs(fast_words, count), signs)


@given(st.data(), sizes(130), st.integers(0, 2**32 - 1))
def test_pack_signs_places_each_bit(data, count, seed):
    signs, width = random_signs(count, seed), width_of(count)
    words = ref.pack_signs(signs)
    at = data.draw(st.integers(0, count - 1))
    assert (int(words[at // width]) >> at % width) & 1 == (signs[at] < 0)
    assert sum(int(word).bit_count() for word in words) == (signs < 0).sum()  # pad bits are 0


@given(sizes(70), sizes(70), st.integers(0, 2**32 - 1))
def test_pack_signs_takes_any_strides(rows, count, seed):
    signs = random_signs((count, rows), seed)
    words = ref.pack_signs(signs.T)
    assert_same(words, ref.pack_signs(signs.T.copy()))
    assert_same(fast.pack_signs(torch.from_numpy(signs).mT), words)
    strided = np.repeat(words, 2, axis=1)[:, ::2]
    assert_same(ref.unpack_signs(strided, count), signs.T)
    signed = strided.view({1: np.uint8, 2: np.int16, 4: np.int32}[words.itemsize])
    assert_same(fast.unpack_signs(torch.from_numpy(signed), count), signs.T)


@pytest.mark.parametrize(("count", "words"), [(5, "<u1"), (13, "<u2"), (77, "<u4")])
def test_pack_signs_is_the_documented_layout(count, words):
    signs = random_signs((3, count))
    bits = np.pad(signs < 0, [(0, 0), (0, -count % 32)])
    number = -(-count // width_of(count))
    expected = np.packbits(bits, axis=-1, bitorder="little").view(words)[:, :number]
    assert_same(ref.pack_signs(signs), expected.astype(words[1:]))


BACKENDS = [
    (ref, np.asarray, {8: "uint8", 16: "uint16", 32: "uint32"}),
    (fast, torch.from_numpy, {8: "torch.uint8", 16: "torch.int16", 32: "torch.int32"}),
]


@pytest.mark.parametrize(("module", "convert", "names"), BACKENDS, ids=["reference", "fast"])
@pytest.mark.parametrize("count", [7, 8, 13, 16, 17, 40])
def test_unpack_signs_refuses_damaged_words(module, convert, names, count):
    words = module.pack_signs(convert(random_signs((2, count))))
    width = width_of(count)
    number = -(-count // width)
    twice = np.tile(np.asarray(words), 2)
    with pytest.raises(
        ValueError, match=rf"{count} signs need {number} word\(s\) of {names[width]} a row, but there are"
    ):
        module.unpack_signs(convert(twice), count)
    for other in set(names) - {width}:
        wide = np.asarray(words).astype(names[other].removeprefix("torch."))
        with pytest.raises(ValueError, match=rf"word\(s\) of {names[width]} a row, .* of {names[other]}"):
            module.unpack_signs(convert(wide), count)
    for pad in range(count, number * width):
        damaged = np.asarray(words).copy()
        damaged.view(np.uint8)[1, pad // 8] |= 1 << pad % 8
        with pytest.raises(ValueError, match="pad bit"):
            module.unpack_signs(convert(damaged), count)


@pytest.mark.parametrize(("module", "convert"), [(ref, np.asarray), (fast, torch.tensor)])
def test_pack_signs_refuses_nan(module, convert):
    with pytest.raises(ValueError, match="NaN"):
        module.pack_signs(convert([1.0, float("nan")]))


@given(factor_arrays())
def test_pack_factors_agrees_and_keeps_the_signs(paths):
    for arrays in paths:
        packed = ref.pack_factors(ref.Factors(*arrays))
        fast_packed = fast.pack_factors(fast.Factors(*map(torch.from_numpy, arrays)))
        for mine, theirs in zip(fast_packed, packed, strict=True):
            assert_same(mine, theirs)
        back = ref.unpack_factors(packed)
        assert_same(back.u, ref.Factors(*arrays).u_sign)
        assert_same(back.v, ref.Factors(*arrays).v_sign)
        assert_same(back.h, arrays[2].astype(np.float16).astype(np.float32))
        for mine, theirs in zip(fast.unpack_factors(fast_packed), back, strict=True):
            assert_same(mine, theirs)


@pytest.mark.parametrize("scale", ["h", "ell", "g"])
def test_pack_factors_names_the_scale_that_overflows(scale):
    arrays = {"u": np.ones((3, 2)), "v": np.ones((4, 2)), "h": np.ones(3), "ell": np.ones(2), "g": np.ones(4)}
    arrays[scale] = arrays[scale] * 1e5
    with pytest.raises(ValueError, match=f"scale {scale} does not fit float16"):
        ref.pack_factors(ref.Factors(**arrays))
    with pytest.raises(ValueError, match=f"scale {scale} does not fit float16"):
        fast.pack_factors(fast.Factors(**{name: torch.from_numpy(array) for name, array in arrays.items()}))
