"""What functions take: arrays of their own package that hold floats, lists of paths, and 16 bits in float32."""

import importlib

import littlebit.fast as fast
import littlebit.reference as reference
import numpy as np
import pytest
import torch
from compare import assert_same
from littlebit.fast.dual_svid import factors_from
from littlebit.fast.models.layers import LittleBitLinear, PackedLinear

WEIGHT = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
X = np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)


def both():
    """Each package with its weight, input and paths, and what turns NumPy's arrays into its own."""
    return [
        pytest.param(reference, np.asarray, id="reference"),
        pytest.param(fast, torch.as_tensor, id="fast"),
    ]


def calls(package, own):
    """linear, linear_vjp and packed_linear as functions of x, paths and bias."""
    paths = package.compensate(own(WEIGHT), [3, 2])
    packed = [package.pack_factors(path) for path in paths]
    grad = own(np.ones((2, 12), np.float32))
    return [
        (lambda x, paths=paths, bias=None: package.linear(x, paths, bias), paths),
        (lambda x, paths=paths, bias=None: package.linear_vjp(x, paths, grad), paths),
        (lambda x, paths=packed, bias=None: package.packed_linear(x, paths, bias), packed),
    ]


@pytest.mark.parametrize(("package", "own"), both())
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.bool_])
def test_linear_refuses_integers(package, own, dtype):
    for call, _ in calls(package, own):
        with pytest.raises(TypeError, match=r"the input must hold floating-point numbers, got .*: convert it first"):
            call(own(np.ones((2, 8), dtype)))


@pytest.mark.parametrize(("package", "own"), both())
def test_linear_refuses_arrays_of_the_other_package(package, own):
    other, kind = (torch.as_tensor, "numpy.ndarray") if package is reference else (np.asarray, "torch.Tensor")
    for call, _ in calls(package, own):
        with pytest.raises(TypeError, match=rf"the input must be a {kind}, got .* littlebit\.fast for torch"):
            call(other(X))
        with pytest.raises(TypeError, match=f"the input must be a {kind}, got builtins.list"):
            call(X.tolist())
    theirs = fast if package is reference else reference
    for (call, _), (_, paths) in zip(calls(package, own), calls(theirs, other), strict=True):
        with pytest.raises(TypeError, match=r"paths must be a list of at least one (Packed)?Factors, got"):
            call(own(X), paths)


@pytest.mark.parametrize(("package", "own"), both())
def test_linear_refuses_paths_that_are_no_list_of_paths(package, own):
    found = calls(package, own)
    for call, paths in found:
        with pytest.raises(TypeError, match=r"got one (Packed)?Factors: write \[path\]"):
            call(own(X), paths[0])
        with pytest.raises(TypeError, match=r"at least one (Packed)?Factors, got none"):
            call(own(X), [])
        with pytest.raises(TypeError, match=r"at least one (Packed)?Factors, got ndarray|got Tensor"):
            call(own(X), list(paths[0]))
        call(own(X), tuple(paths))
    with pytest.raises(TypeError, match="at least one PackedFactors, got Factors"):
        found[2][0](own(X), found[0][1])
    with pytest.raises(TypeError, match="at least one Factors, got PackedFactors"):
        found[0][0](own(X), found[2][1])


@pytest.mark.parametrize(("package", "own"), both())
def test_linear_refuses_shapes_that_do_not_fit(package, own):
    wide = package.compensate(own(WEIGHT[:, :4]), [2])
    for (call, paths), other in zip(calls(package, own), (wide, wide, [package.pack_factors(wide[0])]), strict=True):
        for x in (np.ones((2, 7), np.float32), np.ones((), np.float32), np.ones((8, 2), np.float32)):
            with pytest.raises(ValueError, match="the input's last axis must be d_in = 8, but its shape is"):
                call(own(x))
        with pytest.raises(ValueError, match="all paths must have the sizes of the first, 12 x 8, but one is 12 x 4"):
            call(own(X), [*paths, *other])
    for call, _ in calls(package, own)[::2]:
        for bias in (np.ones(1, np.float32), np.ones((1, 12), np.float32), np.ones(8, np.float32)):
            with pytest.raises(ValueError, match=r"the bias must have the shape \(12,\), but its shape is"):
                call(own(X), bias=own(bias))
        with pytest.raises(TypeError, match="the bias must hold floating-point numbers"):
            call(own(X), bias=own(np.ones(12, np.int64)))


def test_both_packages_say_the_same():
    said = []
    for package, own in ((reference, np.asarray), (fast, torch.as_tensor)):
        messages = []
        for call, paths in calls(package, own):
            for given in ((own(X[:, :5]),), (own(X), paths[0])):
                with pytest.raises((TypeError, ValueError)) as error:
                    call(*given)
                messages.append(str(error.value))
        said.append(messages)
    assert said[0] == said[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_linear_keeps_the_dtype_of_its_input(dtype):
    x = torch.as_tensor(X)
    for call, _ in calls(fast, torch.as_tensor)[::2]:
        y = call(x.to(dtype), bias=torch.ones(12))
        assert y.dtype == dtype
        # 16 bits: inputs, the products with A and with B, and the sum are rounded, each relative to numbers below 16
        assert (
            float((y.double() - call(x.double(), bias=torch.ones(12))).abs().max()) <= 8 * 16 * torch.finfo(dtype).eps
        )


def test_layers_refuse_integers_too():
    paths = fast.compensate(torch.as_tensor(WEIGHT), [3])
    trained = LittleBitLinear(paths)
    packed = trained.pack()
    assert isinstance(packed, PackedLinear)
    packed(torch.as_tensor(X))  # makes a plan, which must not answer for integers
    for layer in (trained, packed):
        with pytest.raises(TypeError, match=r"the input must hold floating-point numbers, got torch\.int64"):
            layer(torch.ones(2, 8, dtype=torch.int64))


def decompositions(package, own):
    """Every function that decomposes a weight or a part of one, by name, with fixed random choices."""
    rng = np.random.default_rng(1)
    rotation = own(np.linalg.qr(rng.standard_normal((4, 4)))[0].astype(np.float32))
    sketch, one = own(rng.standard_normal((8, 6)).astype(np.float32)), own(np.ones(12, np.float32))
    eight = own(np.ones(8, np.float32))
    factors_from = importlib.import_module(f"{package.__name__}.dual_svid").factors_from
    return {
        "svd": package.svd,
        "truncated_svd": lambda w: package.truncated_svd(w, 4, like(sketch, w)),
        "rank_one": lambda w: package.rank_one(abs(w)),
        "svid": package.svid,
        "dual_svid": lambda w: package.dual_svid(w, 4),
        "factors_from": lambda w: factors_from(w, w[:8]),
        "itq": lambda w: package.itq(w, 4, like(rotation, w), steps=3),
        "joint_itq": lambda w: package.joint_itq(w[:, :4], like(rotation, w), steps=3),
        "random_rotation": lambda w: package.random_rotation(w[:4, :4]),
        "admm": lambda w: package.admm(w, 4, steps=5),
        "refit_scales": lambda w: package.refit_scales(w, package.dual_svid(w, 4)),
        "compensate": lambda w: package.compensate(w, [3, 2]),
        "compensate_weighted": lambda w: package.compensate_weighted(w, [3], like(one, w), like(eight, w)),
        "importance": lambda w: package.importance(abs(w)),
    }


def like(array, other):
    return array.to(other.dtype) if isinstance(array, torch.Tensor) else array.astype(other.dtype)


def leaves(found):
    if isinstance(found, np.ndarray | torch.Tensor):
        return [found]
    return [leaf for each in found for leaf in leaves(each)]


NAMES = list(decompositions(fast, torch.as_tensor))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_are_decomposed_in_float32(name, dtype):
    call = decompositions(fast, torch.as_tensor)[name]
    weight = torch.as_tensor(WEIGHT).to(dtype)
    if name in ("truncated_svd", "itq", "joint_itq"):  # their random choices are rounded too
        sixteen = leaves(call(weight))
        assert all(leaf.dtype == torch.float32 for leaf in sixteen)
        return
    for mine, theirs in zip(leaves(call(weight)), leaves(call(weight.float())), strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_16_bits_are_decomposed_in_float32_by_the_reference(name):
    call = decompositions(reference, np.asarray)[name]
    weight = WEIGHT.astype(np.float16)
    for mine in leaves(call(weight)):
        assert mine.dtype == np.float32
    if name not in ("truncated_svd", "itq", "joint_itq"):
        for mine, theirs in zip(leaves(call(weight)), leaves(call(weight.astype(np.float32))), strict=True):
            assert_same(mine, theirs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("package", "own"), both())
def test_decompositions_refuse_integers_and_the_other_package_s_arrays(name, package, own):
    call = decompositions(package, own)[name]
    with pytest.raises(TypeError, match="must hold floating-point numbers, got"):
        call(own((4 * WEIGHT).astype(np.int32)))
    other = torch.as_tensor if package is reference else np.asarray
    if name not in ("truncated_svd", "itq", "joint_itq", "compensate_weighted"):  # `like` would be confused
        with pytest.raises(TypeError, match=r"must be a (numpy\.ndarray|torch\.Tensor), got"):
            call(other(WEIGHT))


def test_pack_signs_refuses_numpy_in_torch():
    with pytest.raises(TypeError, match=r"signs must be a torch\.Tensor, got numpy\.ndarray"):
        fast.pack_signs(WEIGHT)
    with pytest.raises(TypeError, match=r"u must be a torch\.Tensor"):
        factors_from(WEIGHT, WEIGHT)
