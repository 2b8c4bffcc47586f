"""Test that the book's baselines hold what their bits are counted for, and begin as near to a weight as they can."""

import sys
from pathlib import Path

import pytest
import torch
from compare import assert_same

sys.path.insert(0, str(Path(__file__).parents[2] / "book" / "experiments"))

from baselines import GroupLinear, OneBitLinear, PrunedLinear, UnitLatentScale
from littlebit.fast import LittleBitLinear, dual_svid
from littlebit.fast.bits import layer_bits

D_OUT, D_IN = 24, 40
WEIGHT = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(0))
SCALES = 16 * (D_OUT + D_IN)


@pytest.mark.parametrize(
    ("layer", "bits"),
    [
        (OneBitLinear(WEIGHT), D_OUT * D_IN + SCALES),
        (GroupLinear(WEIGHT), D_OUT * D_IN + 16 * D_OUT),
        (PrunedLinear(WEIGHT), D_OUT * D_IN // 8 * (1 + 3) + SCALES),
    ],
)
def test_stored_bits_count_signs_masks_and_scales(layer, bits):
    assert layer.stored_bits() == bits
    weight = layer.weight()
    kept = weight != 0
    assert_same(weight.sign()[kept], WEIGHT.sign()[kept])
    assert_same(layer(torch.eye(D_IN)), weight.mT)
    assert torch.linalg.norm(WEIGHT - weight) < torch.linalg.norm(WEIGHT)


def test_pruned_layer_keeps_the_largest_of_eight():
    kept = (PrunedLinear(WEIGHT).weight() != 0).view(D_OUT, -1, 8)
    assert_same(kept.sum(-1), torch.ones(D_OUT, D_IN // 8, dtype=torch.int64))
    assert_same(kept.int().argmax(-1), WEIGHT.abs().view(D_OUT, -1, 8).argmax(-1))


def test_unit_latent_scale_keeps_signs_and_the_mean_scale():
    path = dual_svid(WEIGHT, 8)._replace(ell=torch.full((8,), 0.5))
    layer = UnitLatentScale(LittleBitLinear([path]))
    assert layer.stored_bits() == layer_bits(D_OUT, D_IN, (8,)) - 16 * 8
    torch.testing.assert_close(layer(torch.eye(D_IN)).mT, path.to_dense())
