"""Shares of a packed layer compute its outputs, side by side or added up."""

import torch
from compare import assert_same
from hypothesis import given, strategies as st
from littlebit.fast.bench.linear import random_path
from littlebit.fast.integrations.shards import input_share, output_share
from littlebit.fast.kernels.unpacked import unpacked
from littlebit.fast.packing import PackedFactors


def shared(path, share):
    return PackedFactors(*(share(name, tensor) for name, tensor in zip(path._fields, path, strict=True)))


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.integers(0, 99), st.integers(1, 9))
def test_shares_are_parts_of_the_weight(processes, outputs, inputs, seed, rank):
    d_out, d_in = processes * outputs, processes * inputs
    path = random_path(d_out, d_in, min(rank, d_out, d_in), torch.Generator().manual_seed(seed))

    def weight(part):
        a, b = unpacked([part])
        return b.double() @ a.double()

    whole = weight(path)
    columns, rows = [], []
    for at in range(processes):
        columns.append(weight(shared(path, lambda n, t, at=at: output_share(n, t, at * outputs, outputs))))
        rows.append(weight(shared(path, lambda n, t, at=at: input_share(n, t, d_in, at * inputs, inputs))))
    assert_same(torch.cat(columns), whole)
    assert_same(torch.cat(rows, 1), whole)
