"""Make and read golden vectors: inputs and results for languages in which Hypothesis cannot run.

`golden/vectors.json` and `golden/vectors.npz` hold the same cases, `golden/version-*` one checkpoint in each version of
the file format. `python -m littlebit.conformance.vectors FOLDER` writes them.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from littlebit.reference import Factors, PackedFactors

from . import exact
from .checkpoint import VERSIONS, Layers, write_layers
from .strategies import WORD_EDGES

GOLDEN = Path(__file__).with_name("golden")
FORMAT = 1  # raised when the meaning of a field changes; new cases may come without that
EPS32 = float(np.finfo(np.float32).eps)


class Case(NamedTuple):
    """Hold one golden case.

    Attributes
    ----------
    function : str
        A function of the protocol.
    inputs : dict of str to array or number
    expected : dict of str to array
        Exact results under the function's names. For a rounded result NAME there is NAME and NAME.bound, in float64: a
        float32 implementation may be off by the bound, entry by entry.
    """

    function: str
    inputs: dict[str, Any]
    expected: dict[str, np.ndarray]


def checkpoints() -> list[Path]:
    """List the folders of golden checkpoints."""
    return sorted(path for path in GOLDEN.iterdir() if path.is_dir())


def expected_layers() -> Layers:
    """Return what all golden checkpoints hold."""
    found: Layers = {}
    for case in load():
        if case.function == "read_layers":
            bias = case.expected.get("bias")
            found[case.inputs["layer"]] = paths_of(case.expected), bias
    return found


def paths_of(arrays: dict[str, np.ndarray], cls: Any = PackedFactors) -> list[Any]:
    """Collect packed paths, or Factors, from arrays that are named paths.K.FIELD."""
    count = 1 + max(int(name.split(".")[1]) for name in arrays if name.startswith("paths."))
    return [cls(*(arrays[f"paths.{k}.{field}"] for field in cls._fields)) for k in range(count)]


def named(paths: list[Any]) -> dict[str, np.ndarray]:
    """Name the arrays of paths paths.K.FIELD."""
    return {f"paths.{k}.{field}": array for k, path in enumerate(paths) for field, array in path._asdict().items()}


def bounded(name: str, result: exact.Bounded) -> dict[str, np.ndarray]:
    """Return a result and its bound for float32, as golden vectors store them."""
    tiny = float(np.finfo(np.float32).tiny)
    bound = 2 * result.terms * (EPS32 * result.magnitude + tiny)
    return {name: np.asarray(result.value), f"{name}.bound": np.asarray(bound)}


def random_path(rng: np.random.Generator, d_out: int, d_in: int, rank: int, width: float = 1.0) -> Factors:
    """Make a path with normal latents and scales that float16 holds exactly."""
    scales = (rng.standard_normal(size).astype(np.float16).astype(np.float32) for size in (d_out, rank, d_in))
    return Factors(*((width * rng.standard_normal((size, rank))).astype(np.float32) for size in (d_out, d_in)), *scales)


def packed(path: Factors) -> PackedFactors:
    """Pack a path sign by sign."""
    halves = (scale.astype(np.float16) for scale in (path.h, path.ell, path.g))
    return PackedFactors(exact.pack(path.u), exact.pack(path.v.T), *halves)


def cases() -> Iterator[Case]:
    """Make all cases anew."""
    rng = np.random.default_rng(0)
    for count in WORD_EDGES:
        signs = rng.choice([-1, 1], (3, count)).astype(np.int8)
        yield Case("pack_signs", {"signs": signs}, {"words": exact.pack(signs)})
    for d_out, d_in, ranks in ((1, 1, (1,)), (5, 40, (17,)), (33, 9, (8, 3)), (16, 65, (16, 33))):
        paths = [packed(random_path(rng, d_out, d_in, rank)) for rank in ranks]
        x, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, d_in), d_out))
        dense = sum(exact.dense(exact.factors_of(path)) for path in paths)
        yield Case("packed_linear", {"x": x, "bias": bias} | named(paths), bounded("y", exact.linear(x, paths, bias)))
        yield Case("unpack_factors", named(paths), {"weight": np.asarray(dense)})
    for rule in ("smooth_sign", "straight_through"):
        paths = [random_path(rng, 4, 6, rank, width=0.01) for rank in (3, 2)]
        x, grad = (rng.standard_normal((3, size)).astype(np.float32) for size in (6, 4))
        expected: dict[str, np.ndarray] = {}
        for name, results in exact.linear_vjp(x, paths, grad, rule).items():
            for k, result in enumerate(results):
                expected |= bounded(name if name in ("x", "bias") else f"paths.{k}.{name}", result)
        yield Case("linear_vjp", {"x": x, "grad": grad, "rule": rule} | named(paths), expected)
    t = rng.standard_normal((3, 8)).astype(np.float32)
    t[1] = 0
    scale = np.abs(t).max(axis=1, keepdims=True) / np.float32(127)
    scale[1] = 1
    yield Case(
        "round_latents", {"latent": t, "dtype": "int8"}, {"codes": np.rint(t / scale).astype(np.int8), "scale": scale}
    )
    for at, (d_out, d_in, ranks) in enumerate(((24, 40, (17, 5)), (8, 33, (8,)))):
        paths = [packed(random_path(rng, d_out, d_in, rank)) for rank in ranks]
        bias = {} if at else {"bias": rng.standard_normal(d_out).astype(np.float16)}
        yield Case("read_layers", {"layer": f"model.layers.{at}.q_proj"}, named(paths) | bias)


def write(folder: Path) -> None:
    """Write vectors.json, vectors.npz and the checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    made, arrays = list(cases()), {}
    for at, case in enumerate(made):
        for kind in ("inputs", "expected"):
            values = getattr(case, kind).items()
            arrays |= {f"{at}.{kind}.{name}": value for name, value in values if isinstance(value, np.ndarray)}
    np.savez_compressed(folder / "vectors.npz", **arrays)
    lines = [
        json.dumps({"function": c.function, "inputs": plain(c.inputs), "expected": plain(c.expected)}) for c in made
    ]
    body = ",\n".join(lines)
    (folder / "vectors.json").write_text(f'{{"format": {FORMAT}, "cases": [\n{body}\n]}}\n', encoding="utf-8")
    layers: Layers = {
        case.inputs["layer"]: (paths_of(case.expected), case.expected.get("bias"))
        for case in made
        if case.function == "read_layers"
    }
    for version in VERSIONS:
        write_layers(folder / f"version-{version}", layers, version)
    write_layers(folder / f"version-{VERSIONS[-1]}-sharded", layers, sharded=True)


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Turn arrays into dtype, shape and a flat list of numbers, row by row."""
    return {
        name: {"dtype": str(value.dtype), "shape": list(value.shape), "data": value.ravel().tolist()}
        if isinstance(value, np.ndarray)
        else value
        for name, value in values.items()
    }


def load(folder: Path = GOLDEN) -> list[Case]:
    """Read vectors.json."""
    stored = json.loads((folder / "vectors.json").read_text(encoding="utf-8"))

    def arrays(values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: np.array(value["data"], value["dtype"]).reshape(value["shape"]) if isinstance(value, dict) else value
            for name, value in values.items()
        }

    return [Case(each["function"], arrays(each["inputs"]), arrays(each["expected"])) for each in stored["cases"]]


if __name__ == "__main__":
    write(Path(sys.argv[1]))
