"""The packed layers of a checkpoint, bit for bit."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import checkpoint, vectors
from ..backend import Backend
from ..checkpoint import Layers
from ..compare import assert_same, assert_true
from ..law import Draw, laws_of
from ..strategies import generators, sizes
from .latent_cache import random_paths
from .packing import assert_refused

LAWS, law = laws_of("checkpoints")
FILES = "packed format, sections Files and Packed layers"
SUMS = "packed format, section Checksums"


def some_layers(draw: Draw) -> Layers:
    """Draw one to three packed layers of ranks up to min(d_out, d_in), with and without bias."""
    found: Layers = {}
    for at in range(draw(st.integers(1, 3))):
        d_out, d_in, rng = draw(sizes(35)), draw(sizes(35)), draw(generators())
        ranks = draw(st.lists(st.integers(1, min(d_out, d_in)), min_size=1, max_size=2))
        bias = rng.standard_normal(d_out).astype(np.float16) if draw(st.booleans()) else None
        found[f"model.layers.{at}.q_proj"] = random_paths(rng, d_out, d_in, ranks), bias
    return found


def assert_same_layers(found: Layers, wanted: Layers) -> None:
    """Require the same layers, every bit of them."""
    assert_true(set(found) == set(wanted), f"layers {sorted(found)} instead of {sorted(wanted)}")
    for name, (paths, bias) in wanted.items():
        mine, my_bias = found[name]
        assert_true(len(mine) == len(paths), f"{name}: {len(mine)} paths instead of {len(paths)}")
        assert_true((my_bias is None) == (bias is None), f"{name}: bias {my_bias} instead of {bias}")
        pairs: list[Any] = [(f"bias of {name}", my_bias, bias)] if bias is not None else []
        for k, (one, other) in enumerate(zip(mine, paths, strict=True)):
            pairs += [
                (f"{field} of path {k} of {name}", getattr(one, field), each) for field, each in other._asdict().items()
            ]
        for what, one, other in pairs:
            try:
                assert_same(one, other)
            except AssertionError as error:
                raise AssertionError(f"{what}: {error}") from error


@law("read_layers", source=FILES)
def golden_checkpoints_are_read(backend: Backend, draw: Draw) -> None:
    """read_layers(folder) gives every bit of the golden checkpoints: one of each version, and one in two files."""
    folder = draw(st.sampled_from(vectors.checkpoints()))
    assert_same_layers(backend.read_layers(folder), vectors.expected_layers())


@law("read_layers", source=FILES)
def any_layers_are_read(backend: Backend, draw: Draw) -> None:
    """read_layers(folder) gives every word and scale that a checkpoint holds, for any sizes, ranks and paths."""
    wanted, version = some_layers(draw), draw(st.sampled_from(checkpoint.VERSIONS))
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "checkpoint")
        backend.prepare(checkpoint.write_layers, made, wanted, version, draw(st.booleans()))
        assert_same_layers(backend.read_layers(made), wanted)


@law("write_layers", source=FILES)
def written_layers_are_in_the_format(backend: Backend, draw: Draw) -> None:
    """write_layers(folder, layers) writes a checkpoint that a reader of the specification reads, checksums included."""
    wanted = some_layers(draw)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "checkpoint")
        backend.write_layers(made, wanted)
        assert_same_layers(checkpoint.read_layers(made), wanted)


@law("read_layers", "write_layers", source=FILES)
def layers_survive_a_round_trip(backend: Backend, draw: Draw) -> None:
    """Reading what was written gives the same words, scales and biases."""
    wanted = some_layers(draw)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "checkpoint")
        backend.write_layers(made, wanted)
        assert_same_layers(backend.read_layers(made), wanted)


@law("read_layers", source=SUMS)
def damaged_checkpoints_are_refused(backend: Backend, draw: Draw) -> None:
    """A checkpoint of version 2 or later in which one bit of a tensor or of config.json changed raises ValueError."""
    source = draw(st.sampled_from([each for each in vectors.checkpoints() if not each.name.startswith("version-1")]))
    if draw(st.booleans()):
        data = (source / "config.json").read_bytes()
        file, bit = "config.json", 0
        at = len(data) - 1 - data.index(b"8", data.index(b'"bits"'))  # "bits": 8 becomes 9
    else:
        file = draw(st.sampled_from(sorted(each.name for each in source.glob("*.safetensors"))))
        data = (source / file).read_bytes()
        body = len(data) - 8 - int.from_bytes(data[:8], "little")
        at, bit = draw(st.integers(0, body - 1)), draw(st.integers(0, 7))
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "damaged")
        backend.prepare(checkpoint.copy_damaged, source, copy, file, at, bit)
        assert_refused(lambda: backend.read_layers(copy), f"a checkpoint was read of which a bit of {file} changed")
