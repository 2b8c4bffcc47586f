"""Test what errors of packing say; test_laws.py tests packing itself."""

import littlebit.fast as fast
import littlebit.reference as ref
import numpy as np
import pytest
import torch


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
