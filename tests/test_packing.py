"""Packing: every sign comes back, from the documented words, in both backends."""

import littlebit.fast as fast
import littlebit.reference as ref
import numpy as np
import pytest
import torch
from compare import assert_same
from hypothesis import given, strategies as st
from strategies import factor_arrays, sizes

PRIMES = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 61, 67, 97, 101, 127, 131]


def random_signs(shape, seed=0):
    return np.where(np.random.default_rng(seed).random(shape) < 0.5, -1, 1).astype(np.float32)


@pytest.mark.parametrize("count", sorted({1, 31, 32, 33, 63, 64, 65, *PRIMES}))
@pytest.mark.parametrize("rows", [1, 5])
def test_pack_signs_round_trip(count, rows):
    signs = random_signs((rows, count))
    words = ref.pack_signs(signs)
    assert words.shape == (rows, -(-count // 32))
    assert words.dtype == np.uint32
    assert_same(ref.unpack_signs(words, count), signs)
    assert_same(fast.pack_signs(torch.from_numpy(signs)), words)
    assert_same(fast.unpack_signs(fast.pack_signs(torch.from_numpy(signs)), count), signs)


@given(st.data(), sizes(130), st.integers(0, 2**32 - 1))
def test_pack_signs_places_each_bit(data, count, seed):
    signs = random_signs(count, seed)
    words = ref.pack_signs(signs)
    at = data.draw(st.integers(0, count - 1))
    assert (int(words[at // 32]) >> at % 32) & 1 == (signs[at] < 0)
    assert sum(int(word).bit_count() for word in words) == (signs < 0).sum()  # pad bits are 0


def test_pack_signs_is_the_documented_layout():
    signs = random_signs((3, 77))
    padded = np.pad(signs < 0, [(0, 0), (0, 96 - 77)])
    expected = np.packbits(padded, axis=-1, bitorder="little").view("<u4")
    assert_same(ref.pack_signs(signs), expected.astype(np.uint32))


@pytest.mark.parametrize("backend", ["reference", "fast"])
def test_unpack_signs_refuses_damaged_words(backend):
    module, convert = (ref, np.asarray) if backend == "reference" else (fast, torch.from_numpy)
    words = ref.pack_signs(random_signs((2, 40))).view(np.int32)
    words = words.view(np.uint32) if backend == "reference" else words
    with pytest.raises(ValueError, match="40 signs need 2 words"):
        module.unpack_signs(convert(words[:, :1].copy()), 40)
    words[0, 1] |= 1 << 20
    with pytest.raises(ValueError, match="pad bit"):
        module.unpack_signs(convert(words), 40)


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
