"""Test scales of 8 bits, and what errors of packing say; test_laws.py tests the rest of packing."""

import littlebit.fast as fast
import littlebit.reference as ref
import numpy as np
import pytest
import torch
from compare import assert_same
from hypothesis import given, strategies as st
from littlebit.conformance.strategies import factor_arrays


def random_signs(shape, seed=0):
    return np.where(np.random.default_rng(seed).random(shape) < 0.5, -1, 1).astype(np.float32)


def width_of(count):
    """Restate the rule: the narrowest words that hold a row."""
    return 8 if count <= 8 else 16 if count <= 16 else 32


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


@pytest.mark.parametrize("scale", ["h", "ell", "g"])
def test_pack_factors_names_the_scale_that_overflows(scale):
    arrays = {"u": np.ones((3, 2)), "v": np.ones((4, 2)), "h": np.ones(3), "ell": np.ones(2), "g": np.ones(4)}
    arrays[scale] = arrays[scale] * 1e5
    with pytest.raises(ValueError, match=f"scale {scale} does not fit float16"):
        ref.pack_factors(ref.Factors(**arrays))
    with pytest.raises(ValueError, match=f"scale {scale} does not fit float16"):
        fast.pack_factors(fast.Factors(**{name: torch.from_numpy(array) for name, array in arrays.items()}))


halves = st.floats(0, 60000, width=16, allow_subnormal=True)


@given(st.lists(halves, min_size=1, max_size=40))
def test_codes_of_8_bits_agree_and_are_kept(scales):
    scale = np.array(scales, np.float16)
    codes, peak = ref.packing.encode_scale(scale)
    decoded = ref.packing.decode_scale(codes, peak)
    fast_codes, fast_peak = fast.packing.encode_scale(torch.from_numpy(scale))
    assert_same(fast_codes, codes)
    assert_same(fast_peak, peak)
    assert_same(fast.packing.decode_scale(fast_codes, fast_peak), decoded)
    error = np.abs(decoded.astype(float) - scale.astype(float))
    rounding = np.spacing(decoded).astype(float) / 2  # of the float16 that is decoded
    assert (error <= float(peak) / 510 * (1 + 1e-5) + rounding).all()
    again = ref.packing.encode_scale(decoded)
    assert_same(again[0], codes)
    assert_same(again[1], peak)


@given(factor_arrays())
def test_pack_factors_moves_the_signs_of_8_bit_scales(paths):
    for arrays in paths:
        packed = ref.pack_factors(ref.Factors(*arrays), 8)
        theirs = fast.pack_factors(fast.Factors(*map(torch.from_numpy, arrays)), 8)
        for left, right in zip(theirs, packed, strict=True):
            assert_same(left, right)
        u, v, h, ell, g = (array.astype(np.float64) for array in ref.unpack_factors(packed))
        for scale in (h, ell, g):
            assert (scale >= 0).all()
        plain = ref.unpack_factors(ref.pack_factors(ref.Factors(*arrays)))
        own_u, own_v, *own = (array.astype(np.float64) for array in plain)
        steps = [np.abs(scale).max() / 510 * 1.01 + 1e-7 for scale in own]
        found = (u * h[:, None])[:, None, :] * ell[None, None, :]  # (d_out, 1, rank), the signed scales of each product
        expected = (own_u * own[0][:, None])[:, None, :] * own[1][None, None, :]
        bound = steps[0] * np.abs(own[1]).max() + steps[1] * np.abs(own[0]).max() + steps[0] * steps[1]
        found, expected = (found * (v * g[:, None])[None], expected * (own_v * own[2][:, None])[None])
        bound = bound * (np.abs(own[2]).max() + steps[2]) + np.abs(own[0]).max() * np.abs(own[1]).max() * steps[2]
        assert (np.abs(found - expected) <= bound * 1.01).all()


@pytest.mark.parametrize("module", [ref, fast])
@pytest.mark.parametrize("bits", [0, 4, 32])
def test_pack_factors_refuses_other_widths(module, bits):
    with pytest.raises(ValueError, match="scale_bits must be 16"):
        module.pack_factors(None, bits)
