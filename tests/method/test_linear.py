"""Test the layer, factorized and packed, in both backends against float64 within the bound of the arithmetic."""

import concurrent.futures
import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import littlebit.fast as fast
import littlebit.reference as ref
import numpy as np
import pytest
import torch
from compare import assert_same, assert_within, roundings
from hypothesis import HealthCheck, given, settings, strategies as st
from littlebit.conformance.strategies import factor_arrays, inputs, sizes
from littlebit.fast.bench.linear import exact_path, random_path
from littlebit.fast.kernels import cpu, cpu_layer as plans, cpu_threads
from littlebit.fast.kernels.cpu_simd import (
    F32X16,
    LEVEL,
    LEVELS,
    U32X16,
    half_bits_to_float,
    lookup_neon,
    supported_levels,
)
from littlebit.fast.kernels.unpacked import unpacked_linear
from llvmlite import binding as llvm, ir


def exact_and_magnitude(x, paths):
    """Compute the output in float64, the same on absolute values, and the roundings that an entry has seen."""
    doubled = [ref.Factors(*(array.astype(np.float64) for array in path)) for path in paths]
    absolute = [ref.Factors(*map(np.abs, path)) for path in doubled]
    absolute = [path._replace(u=np.ones_like(path.u), v=np.ones_like(path.v)) for path in absolute]
    exact = ref.linear(x.astype(np.float64), doubled)
    magnitude = ref.linear(np.abs(x).astype(np.float64), absolute)
    terms = 8 + len(paths) * max(len(path.g) + path.rank for path in doubled)
    return exact, magnitude, terms


def torch_factors(arrays):
    return fast.Factors(*map(torch.from_numpy, arrays))


def rounded_in_16_bits(x, paths, dtype, largest=1.0):
    """What rounding A, A x, B and the output of `linear` to 16 bits adds to the error; nothing for a wider dtype.

    Each product of a sum sees these four roundings and no more, for the sums themselves are of float32. An entry below
    float16's normal numbers is off by half of the smallest one instead, before B is multiplied by `largest`.
    """
    if torch.finfo(dtype).bits > 16:
        return 0.0
    x, half = np.abs(x), torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    a = np.concatenate([np.abs(path.g) * np.ones((len(path.ell), 1)) for path in paths])  # (R, d_in)
    b = np.concatenate([np.abs(np.outer(path.h, path.ell)) for path in paths], axis=1)  # (d_out, R)
    t = x @ a.T
    off_b = b.sum(axis=1)  # of each output, if every entry of A x is off by one
    tiny = x.sum(axis=-1, keepdims=True) * off_b + off_b + largest * t.sum(axis=-1, keepdims=True) + largest
    return roundings(4, dtype) * (t @ b.T) + 1.1 * half * tiny


def in_16_bits(data, paths, dtype):
    """X in a dtype and the paths; in half of the cases all positive, so that no sum is small beside its terms."""
    x = data.draw(inputs(len(paths[0][4])))
    if data.draw(st.booleans()):
        x, paths = np.abs(x), [tuple(np.abs(array) for array in path) for path in paths]
    return torch.from_numpy(x).to(dtype), paths


@given(data=st.data(), paths=factor_arrays(largest=20, paths=1))
def test_linear_agrees_for_bfloat16(data, paths):
    """The factors are rounded to x's dtype. NumPy has no bfloat16, so no law of test_laws.py covers it."""
    dtype = torch.bfloat16
    x, paths = in_16_bits(data, paths, dtype)
    factors = [ref.Factors(*paths[0])]
    exact, magnitude, terms = exact_and_magnitude(x.double().numpy(), factors)
    y = fast.linear(x, [torch_factors(paths[0])])
    assert y.dtype == dtype
    slack = rounded_in_16_bits(x.double().numpy(), factors, dtype)
    single = torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps
    assert_within(y.double(), exact, single * magnitude, terms, slack=slack)


def same_outer(path, first):
    """Resize a path to the d_out and d_in of the first one."""
    u, v, h, ell, g = path
    return (
        np.resize(u, (len(first[2]), len(ell))),
        np.resize(v, (len(first[4]), len(ell))),
        np.resize(h, len(first[2])),
        ell,
        np.resize(g, len(first[4])),
    )


@pytest.mark.parametrize("largest", [20, 127])
@given(data=st.data())
def test_every_kernel_equals_dense(largest, data):
    paths = data.draw(factor_arrays(largest))
    x = data.draw(inputs(len(paths[0][4])))
    paths = [path if at == 0 else same_outer(path, paths[0]) for at, path in enumerate(paths)]
    fast_packed = [fast.pack_factors(torch_factors(path)) for path in paths]
    exact, magnitude, terms = exact_and_magnitude(x, [as_reference(path) for path in fast_packed])
    for kernel in cpu.KERNELS.values():
        y = plans.packed_linear(torch.from_numpy(x).reshape(-1, x.shape[-1]), fast_packed, kernel).reshape(exact.shape)
        # sum - 2 * part: roundings of at most three times the magnitude
        assert_within(y, exact, 3 * magnitude if kernel in (cpu.SELECT, cpu.BYTES) else magnitude, terms)


@given(sizes(40), sizes(40), st.integers(1, 40))
def test_random_path_is_as_pack_factors_makes_it(d_out, d_in, rank):
    path = random_path(d_out, d_in, rank, torch.Generator().manual_seed(0))
    for mine, packed in zip(path, fast.pack_factors(fast.unpack_factors(path)), strict=True):
        assert_same(mine, packed)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 15, 16, 17, 32])
def test_widened_adds_nothing_but_zeros(count):
    words = fast.pack_signs(-torch.ones(3, count))
    assert plans.widen_words(words).dtype == torch.int32
    assert_same(plans.widen_words(words), np.full((3, 1), 2**count - 1, np.uint32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@given(data=st.data(), paths=factor_arrays())
def test_unpacked_linear_agrees_for_every_input_dtype(dtype, data, paths):
    """The factors, and x in between, are rounded to x's dtype, but never to finer than float32."""
    paths = [path if at == 0 else same_outer(path, paths[0]) for at, path in enumerate(paths)]
    x, paths = in_16_bits(data, paths, dtype)
    x = x.reshape(-1, len(paths[0][4]))
    packed = [fast.pack_factors(torch_factors(path)) for path in paths]
    assert_unpacked_agrees(x, packed)
    exact, magnitude, terms = exact_and_magnitude(x.double().numpy(), [as_reference(path) for path in packed])
    assert_within(fast.packed_linear(x.float(), packed), exact, 3 * magnitude, terms)


def assert_unpacked_agrees(x, packed):
    """`unpacked_linear` equals the exact product but for four roundings to 16 bits and sums in float32."""
    references = [as_reference(path) for path in packed]
    exact, magnitude, terms = exact_and_magnitude(x.double().numpy(), references)
    y = unpacked_linear(x, packed)
    assert y.dtype == torch.float32
    largest = max(1.0, *(float(np.abs(np.outer(path.h, path.ell)).max()) for path in references))
    assert_within(
        y, exact, magnitude, terms, slack=rounded_in_16_bits(x.double().numpy(), references, x.dtype, largest)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@given(data=st.data(), d_out=sizes(8), d_in=sizes(16), rank=st.integers(1, 8), count=st.integers(1, 2))
def test_sixteen_bits_are_exact_where_every_sum_is_a_small_integer(dtype, data, d_out, d_in, rank, count):
    """No sum of 16 ones, or of 16 times 16, needs more than bfloat16's 8 bits: there is nothing to round."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    paths = [random_path(d_out, d_in, rank, generator) for _ in range(count)]
    ones = [torch.ones(size, dtype=torch.float16) for size in (d_out, rank, d_in)]
    paths = [fast.PackedFactors(path.u_words, path.v_words, *ones) for path in paths]
    x = torch.randint(0, 2, (3, d_in), generator=generator).to(dtype)
    exact = sum(exact_path(x, path) for path in paths).float()
    assert_same(unpacked_linear(x, paths), exact)
    for y in (fast.linear(x, [fast.unpack_factors(path) for path in paths]), fast.packed_linear(x, paths)):
        assert y.dtype == dtype
        assert_same(y.float(), exact)


def as_reference(packed):
    """Unpack a packed path for the reference."""
    return ref.Factors(*(tensor.numpy() for tensor in fast.unpack_factors(packed)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_unpacked_linear_takes_scales_whose_product_overflows_float16(dtype):
    path = random_path(40, 50, 20, torch.Generator().manual_seed(0))
    path = path._replace(h=path.h * 4e4, ell=path.ell * 4e4, g=path.g * 2.0**-10)
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert_unpacked_agrees(x, [path])


@pytest.mark.parametrize("rank", [5, 16, 33])
def test_packed_linear_on_another_device_waits_for_no_value(rank):
    """Use meta tensors, which have shapes and no values: reading a value would raise."""
    generator = torch.Generator().manual_seed(0)
    paths = [random_path(40, 12, rank, generator), random_path(40, 12, 3, generator)]
    paths = [fast.PackedFactors(*(tensor.to("meta") for tensor in path)) for path in paths]
    for dtype in (torch.float32, torch.float16):
        y = fast.packed_linear(torch.zeros(2, 3, 12, device="meta", dtype=dtype), paths)
        assert (y.shape, y.dtype, y.device.type) == ((2, 3, 40), dtype, "meta")


@given(st.data(), factor_arrays(paths=1))
def test_to_dense_agrees_with_linear(data, paths):
    factors = ref.Factors(*paths[0])
    x = data.draw(inputs(len(factors.g)))
    exact, magnitude, terms = exact_and_magnitude(x, [factors])
    assert_within((x @ factors.to_dense().T).astype(np.float32), exact, magnitude, terms)
    dense = torch_factors(paths[0]).to_dense()
    assert_within(
        dense, factors.to_dense(), np.abs(np.outer(factors.h, factors.g)) * np.abs(factors.ell).sum(), 4 + factors.rank
    )


@pytest.fixture
def any_threads(monkeypatch):
    """Make small layers use several threads too, and restore the number of threads."""
    monkeypatch.setattr(cpu_threads, "PARALLEL_WORK", 0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kernel", list(cpu.KERNELS))
@given(data=st.data(), d_out=sizes(100), d_in=sizes(1200), rank=sizes(300), batch=st.integers(1, 9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_packed_linear_is_the_same_for_any_threads_and_batch(any_threads, kernel, data, d_out, d_in, rank, batch):
    """Compare bit for bit: neither threads nor other rows of x may change the order of a row's additions."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    paths = [random_path(d_out, d_in, rank, generator) for _ in range(data.draw(st.integers(1, 3)))]
    x = torch.randn(batch, d_in, generator=generator)
    torch.set_num_threads(1)
    serial = plans.packed_linear(x, paths, cpu.KERNELS[kernel])
    assert_same(torch.cat([plans.packed_linear(row[None], paths, cpu.KERNELS[kernel]) for row in x]), serial)
    torch.set_num_threads(2)
    assert_same(plans.packed_linear(x, paths, cpu.KERNELS[kernel]), serial)
    exact = sum(exact_path(x, path) for path in paths)
    magnitude = sum(exact_path(x.abs(), in_magnitude(path)) for path in paths)
    assert_within(serial, exact, 3 * magnitude, terms=8 + len(paths) * (d_in + rank))


@given(data=st.data(), d_out=sizes(100), d_in=sizes(300), rank=sizes(100), batch=st.integers(33, 70))
def test_packed_linear_of_a_large_batch_agrees_by_lookups_and_unpacked(data, d_out, d_in, rank, batch):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    paths = [random_path(d_out, d_in, rank, generator) for _ in range(data.draw(st.integers(1, 2)))]
    x = torch.randn(batch, d_in, generator=generator)
    plan = plans.CpuPackedLayer([tensor for path in paths for tensor in path])
    exact = sum(exact_path(x, path) for path in paths)
    magnitude = sum(exact_path(x.abs(), in_magnitude(path)) for path in paths)
    terms = 8 + len(paths) * (d_in + rank)
    assert_within(plan.unpacked(x), exact, magnitude, terms)
    chosen = plan.unpacked(x) if plan.is_quicker_unpacked(batch) else plan(x, cpu.BEST)
    assert_same(fast.packed_linear(x, paths), chosen)


def test_few_rows_and_many_signs_are_never_unpacked(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    plan = plans.CpuPackedLayer(random_path(64, 64, 1, generator))
    assert plan.is_quicker_unpacked(1000)
    assert not plans.CpuPackedLayer(random_path(2000, 2000, 500, generator)).is_quicker_unpacked(plans.LARGE_BATCH + 1)
    monkeypatch.setattr(plans.CpuPackedLayer, "unpacked", lambda *_: pytest.fail("unpacked"))
    plan(torch.zeros(plans.LARGE_BATCH, 64))
    with pytest.raises(pytest.fail.Exception):
        plan(torch.zeros(1000, 64))


def in_magnitude(path):
    """Replace all signs of a path by +1; its scales are positive."""
    return path._replace(u_words=torch.zeros_like(path.u_words), v_words=torch.zeros_like(path.v_words))


def test_packed_linear_serves_several_python_threads_at_once(any_threads):
    torch.set_num_threads(2)
    paths = [random_path(300, 400, 70, torch.Generator().manual_seed(0))]
    x = torch.randn(8, 2, 400, generator=torch.Generator().manual_seed(1))
    expected = [fast.packed_linear(rows, paths) for rows in x]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            for found, wanted in zip(pool.map(lambda rows: fast.packed_linear(rows, paths), x), expected, strict=True):
                assert_same(found, wanted)


def test_packed_linear_is_an_operator_that_torch_can_compile():
    layer = fast.PackedLinear([random_path(40, 50, rank, torch.Generator().manual_seed(0)) for rank in (9, 20)])
    tensors = [tensor for path in layer.factors() for tensor in path]
    torch.library.opcheck(torch.ops.littlebit.packed_linear.default, (torch.randn(3, 50), tensors))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for x in (torch.randn(4, 50), torch.randn(2, 3, 50).bfloat16(), torch.randn(50, 5).T):
            assert_same(compiled(x).float(), layer(x).float())


REACHED = supported_levels(LEVELS[LEVEL][1])

LEVEL_CHECK = """
import sys, numpy as np, torch
sys.path[:0] = [{tests!r}, {tests!r} + '/method']
from compare import assert_same, assert_within
from littlebit.fast.bench.linear import exact_path, random_path
from littlebit.fast.kernels import cpu, cpu_layer as plans, cpu_threads
from littlebit.fast.kernels.cpu_simd import LEVEL
from test_linear import in_magnitude
assert LEVEL == {level!r}
cpu_threads.PARALLEL_WORK = 0
shapes = [(1, 1, 1, 1), (17, 33, 31, 7), (130, 600, 70, 3), (16, 64, 32, 4), (300, 700, 530, 32)]
for seed, (d_out, d_in, rank, batch) in enumerate(shapes):
    generator = torch.Generator().manual_seed(seed)
    paths = [random_path(d_out, d_in, rank, generator) for _ in range(2)]
    x = torch.randn(batch, d_in, generator=generator)
    exact = sum(exact_path(x, path) for path in paths)
    magnitude = sum(exact_path(x.abs(), in_magnitude(path)) for path in paths)
    for kernel in cpu.KERNELS.values():
        torch.set_num_threads(1)
        y = plans.packed_linear(x, paths, kernel)
        assert_within(y, exact, 3 * magnitude, 8 + 2 * (d_in + rank))
        torch.set_num_threads(2)
        assert_same(plans.packed_linear(x, paths, kernel), y)
    unpacked = plans.CpuPackedLayer([tensor for path in paths for tensor in path]).unpacked(x)
    assert_within(unpacked, exact, magnitude, 8 + 2 * (d_in + rank))
"""


@pytest.mark.parametrize("level", REACHED)
def test_packed_linear_agrees_on_every_kind_of_processor(level):
    code = LEVEL_CHECK.format(tests=str(Path(__file__).parents[1]), level=level)
    environment = os.environ | {"LITTLEBIT_CPU": level}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_levels_are_those_of_the_features():
    assert supported_levels("+sse2,+avx,-avx512f,+avx2") == ["avx2", "plain"]
    assert supported_levels("+fp-armv8,+neon,+outline-atomics") == ["neon", "plain"]
    assert supported_levels("") == ["plain"]
    for level, (_, features) in LEVELS.items():
        assert supported_levels(features)[0] == level


def lanes_function(name, body):
    """Compile a function (address of floats, address of words) that stores the result of `body` there to LLVM code."""
    module = ir.Module(name)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [F32X16.as_pointer(), U32X16.as_pointer()]), name)
    builder = ir.IRBuilder(function.append_basic_block())
    table, words = function.args
    builder.store(body(builder, builder.load(table, align=4), builder.load(words, align=4)), table, align=4)
    builder.ret_void()
    return str(module)


def test_lookups_are_four_instructions_of_neon():
    """Compile a lookup and float16 for 64-bit ARM: vectors throughout, and no call."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple("aarch64-unknown-linux-gnu").create_target_machine(
        cpu=LEVELS["neon"][0], features=LEVELS["neon"][1], opt=3
    )
    bodies = {"lookup": lookup_neon, "half": lambda builder, table, words: half_bits_to_float(builder, words, U32X16)}
    for name, body in bodies.items():
        lines = machine.emit_assembly(llvm.parse_assembly(lanes_function(name, body))).splitlines()
        instructions = [line.split()[0] for line in lines if line.startswith("\t") and not line.startswith("\t.")]
        assert instructions.count("tbl") == (4 if name == "lookup" else 0)
        assert not {"bl", "blr", "umov", "fmov"} & set(instructions)  # calls, and single lanes
        assert len(instructions) < 64


def test_an_unknown_kind_of_processor_is_refused():
    environment = os.environ | {"LITTLEBIT_CPU": "abacus"}
    code = "import littlebit.fast.kernels"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "LITTLEBIT_CPU must be one of" in done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_packed_linear_keeps_dtype_and_takes_any_strides(dtype):
    path = random_path(40, 50, 20, torch.Generator().manual_seed(0))
    x = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(1)).to(dtype).permute(2, 1, 0)
    y = fast.packed_linear(x, [path])
    assert y.dtype == dtype
    assert y.shape == (3, 2, 40)
    assert_same(y.float(), fast.packed_linear(x.float().contiguous(), [path]).to(dtype).float())


def test_packed_linear_refuses_wrong_inputs():
    path = random_path(40, 50, 20, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="last axis must be d_in = 50"):
        fast.packed_linear(torch.zeros(2, 49), [path])
    with pytest.raises(ValueError, match=r"words are on cpu and the input is on meta: move .* with \.to\(device\)"):
        fast.packed_linear(torch.zeros(50, device="meta"), [path])
    with pytest.raises(ValueError, match=r"words are on meta and the input is on cpu"):
        fast.packed_linear(torch.zeros(50), [path, path._replace(v_words=path.v_words.to("meta"))])
    with pytest.raises(ValueError, match=r"20 signs need 1 word\(s\) of torch\.int32 a row, .* of torch\.int16"):
        fast.packed_linear(torch.zeros(50), [path._replace(u_words=path.u_words.to(torch.int16))])
    with pytest.raises(ValueError, match=r"50 signs need 2 word\(s\) of torch\.int32 a row, but there are 1"):
        fast.packed_linear(torch.zeros(50), [path._replace(v_words=path.v_words[:, :1])])
    with pytest.raises(ValueError, match="last axis must be d_in = 50"):
        ref.packed_linear(np.zeros((2, 49)), [ref.pack_factors(as_reference(path))])


@given(factor_arrays(), st.data())
def test_packed_linear_gives_its_input_a_gradient(paths, data):
    packed = [fast.pack_factors(fast.Factors(*map(torch.from_numpy, each))) for each in paths]
    unpacked = [fast.unpack_factors(each) for each in packed]
    d_out, d_in = len(packed[0].h), len(packed[0].g)
    x, grad = (torch.randn(3, size, generator=torch.Generator().manual_seed(0)) for size in (d_in, d_out))
    x.requires_grad_()
    y = fast.packed_linear(x, packed)
    assert_same(y, fast.packed_linear(x.detach(), packed))
    y.backward(grad)
    double = [fast.Factors(*(tensor.double() for tensor in path)) for path in unpacked]
    weight = sum(path.to_dense() for path in double)
    magnitude = grad.double().abs() @ sum(
        (path.h.abs()[:, None] * torch.ones_like(path.u)) @ (path.ell.abs()[:, None] * path.g.abs()) for path in double
    )
    terms = d_out + sum(path.rank for path in packed) + 6
    assert_within(x.grad, grad.double() @ weight, magnitude, terms)


def peak_bytes(compute):
    """Memory that a call takes beyond what the process had: all of it, whoever allocates; Linux counts it."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # the peak begins anew
    except OSError:
        pytest.skip("this system does not let a process reset its peak of memory")

    def kilobytes(name):
        return int(re.search(rf"{name}:\s+(\d+) kB", status.read_text())[1])

    before = kilobytes("VmRSS")
    compute()
    return 1024 * (kilobytes("VmHWM") - before)


def test_packed_linear_never_unpacks():
    """A large layer's forward takes far less than a byte for each sign, and unpacking takes four."""
    path = random_path(4096, 4096, 4096, torch.Generator().manual_seed(0))
    x, count = torch.zeros(1, 4096), 2 * 4096 * 4096
    fast.packed_linear(x, [path])  # loads the kernel
    assert peak_bytes(lambda: fast.packed_linear(x, [path])) < count / 2
    assert peak_bytes(lambda: unpacked_linear(x, [path])) > 4 * count


CHANGES = {
    "to bfloat16": lambda layer, other: layer.to(torch.bfloat16),
    "to float64 and back": lambda layer, other: layer.double().half(),
    "to float32": lambda layer, other: layer.float(),
    "load_state_dict": lambda layer, other: layer.load_state_dict(other.state_dict()),
    "load_state_dict with assign": lambda layer, other: layer.load_state_dict(other.state_dict(), assign=True),
    "a buffer replaced": lambda layer, other: setattr(layer.paths[0], "u_words", other.paths[0].u_words),
    "a buffer written": lambda layer, other: layer.paths[0].v_words.copy_(other.paths[0].v_words),
    "a buffer's data replaced": lambda layer, other: setattr(layer.paths[0].g, "data", 2 * layer.paths[0].g),
    "memory read as another dtype": lambda layer, other: setattr(
        layer.paths[0].h, "data", layer.paths[0].h.data.view(torch.bfloat16)
    ),
    "a path replaced": lambda layer, other: layer.paths.__setitem__(0, other.paths[0]),
    "a path removed": lambda layer, other: layer.paths.__delitem__(1),
    "a buffer strided": lambda layer, other: setattr(
        layer.paths[0], "u_words", other.paths[0].u_words.T.contiguous().T
    ),
    "a bias": lambda layer, other: setattr(layer, "bias", torch.ones(70)),
}


@pytest.mark.parametrize("ranks", [(40, 50), (7, 16)])
@pytest.mark.parametrize("change", list(CHANGES))
def test_packed_linear_layer_follows_its_tensors(change, ranks):
    """Change tensors whose addresses the layer keeps from call to call: it must notice every change."""
    generator = torch.Generator().manual_seed(0)
    layer, other = (fast.PackedLinear([random_path(70, 90, rank, generator) for rank in ranks]) for _ in range(2))
    x = torch.randn(3, 90, generator=generator)
    before = layer(x)
    assert_same(layer(x), before)
    CHANGES[change](layer, other)
    expected = fast.packed_linear(x, layer.factors(), layer.bias)
    assert_same(layer(x), expected)
    assert_same(layer(x), expected)
    if not change.startswith("to "):  # scales stay float16
        assert not torch.equal(expected, before)


def test_packed_linear_layer_refuses_words_that_no_longer_fit():
    layer = fast.PackedLinear([random_path(70, 90, 40, torch.Generator().manual_seed(0))])
    x = torch.ones(90)
    layer(x)
    with pytest.raises(ValueError, match="last axis must be d_in = 90"):
        layer(torch.ones(180))
    layer.paths[0].u_words.data = layer.paths[0].u_words.data[:, :1]
    with pytest.raises(ValueError, match="40 signs need 2 word"):
        layer(x)


def test_packed_linear_layer_shares_no_addresses_with_its_copies():
    generator = torch.Generator().manual_seed(0)
    layer = fast.PackedLinear([random_path(70, 90, 40, generator)])
    x = torch.randn(90, generator=generator)
    y = layer(x)
    assert layer.plan is not None
    twin = copy.deepcopy(layer)
    assert twin.plan is None
    assert_same(twin(x), y)
    twin.paths[0].h.mul_(2)
    assert_same(twin(x), 2 * y)
    assert_same(layer(x), y)


def test_packed_linear_layer_may_change_while_threads_call_it():
    """Compare each result with the words before and after a change: it must never mix them."""
    generator = torch.Generator().manual_seed(0)
    layers = [fast.PackedLinear([random_path(70, 90, 40, generator)]) for _ in range(2)]
    x = torch.randn(90, generator=generator)
    wanted = [layer(x) for layer in layers]
    layer = copy.deepcopy(layers[0])
    paths = [copy.deepcopy(each.paths[0]) for each in layers]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = [pool.submit(layer, x) for _ in range(200) if layer.paths.__setitem__(0, paths[_ % 2]) is None]
        assert all(any(torch.equal(each.result(), y) for y in wanted) for each in found)
