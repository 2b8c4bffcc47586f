"""Sign matrix times vectors on a CPU, from packed words, in Numba.

With bit 1 for -1, a row of signs s times x is

    sum_j s_j x_j = sum_j x_j - 2 * sum over set bits j of x_j,

so sixteen signs are one lane mask and one masked addition, and the sum of x is shared by all rows. Lanes are written
as LLVM vectors of sixteen floats, which the compiler maps to AVX-512, AVX2, NEON or plain registers. Four rows of
signs share each load of x when there is one vector; two rows share it for four vectors otherwise. Nothing is unpacked.

Bytes moved: the sign words once per four vectors, the scales (float16) once, x and y once each.
"""
# pyright: reportCallIssue=false

import threading
from collections.abc import Sequence

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model
from torch import Tensor

from ..packing import PackedFactors

LANES = 16
ROWS_PER_TASK = 64
PARALLEL_WORK = 1 << 20  # sign additions below which a second thread costs more than it brings

MAX_THREADS: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]

FLOATS = ir.VectorType(ir.FloatType(), LANES)
MASK = ir.VectorType(ir.IntType(1), LANES)


class Floats(types.Type):
    """Sixteen float32 lanes."""

    def __init__(self):
        super().__init__(name="littlebit_floats16")


floats = Floats()


@register_model(Floats)
class FloatsModel(models.PrimitiveModel):
    """A Floats value is one LLVM vector."""

    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, FLOATS)


def element_pointer(context, builder, array_type, array, index):
    """LLVM pointer to array[index], without bounds check or wraparound."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


@intrinsic
def zeros(typingctx):
    """Sixteen zeros."""

    def codegen(context, builder, signature, args):
        return ir.Constant(FLOATS, [0.0] * LANES)

    return floats(), codegen


@intrinsic
def load(typingctx, x, index):
    """x[index : index + 16] of a float32 array."""

    def codegen(context, builder, signature, args):
        pointer = element_pointer(context, builder, signature.args[0], args[0], args[1])
        return builder.load(builder.bitcast(pointer, FLOATS.as_pointer()), align=4)

    return floats(x, types.intp), codegen


@intrinsic
def add_where(typingctx, total, halfwords, index, lanes):
    """Add lanes to total in those of the sixteen lanes whose bit is set in halfwords[index]."""

    def codegen(context, builder, signature, args):
        pointer = element_pointer(context, builder, signature.args[1], args[1], args[2])
        mask = builder.bitcast(builder.load(pointer), MASK)
        return builder.select(mask, builder.fadd(args[0], args[3]), args[0])

    return floats(floats, halfwords, types.intp, floats), codegen


@intrinsic
def load_half(typingctx, bits, index):
    """bits[index : index + 16] of an array of float16 bits, as float32."""

    def codegen(context, builder, signature, args):
        pointer = element_pointer(context, builder, signature.args[0], args[0], args[1])
        halves = ir.VectorType(ir.HalfType(), LANES)
        return builder.fpext(builder.load(builder.bitcast(pointer, halves.as_pointer()), align=2), FLOATS)

    return floats(bits, types.intp), codegen


@intrinsic
def store(typingctx, x, index, lanes):
    """x[index : index + 16] = lanes, in a float32 array."""

    def codegen(context, builder, signature, args):
        pointer = element_pointer(context, builder, signature.args[0], args[0], args[1])
        builder.store(args[2], builder.bitcast(pointer, FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(x, types.intp, floats), codegen


@intrinsic
def add(typingctx, first, second):
    """Lane by lane, first + second."""

    def codegen(context, builder, signature, args):
        return builder.fadd(*args)

    return floats(floats, floats), codegen


@intrinsic
def multiply(typingctx, first, second):
    """Lane by lane, first * second."""

    def codegen(context, builder, signature, args):
        return builder.fmul(*args)

    return floats(floats, floats), codegen


@intrinsic
def lane_sum(typingctx, lanes):
    """Sum of the sixteen lanes, pairwise."""

    def codegen(context, builder, signature, args):
        (lanes,) = args
        width = LANES
        while width > 1:
            width //= 2
            halves = [
                builder.shuffle_vector(
                    lanes,
                    ir.Constant(lanes.type, ir.Undefined),
                    ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(start, start + width))),
                )
                for start in (0, width)
            ]
            lanes = builder.fadd(*halves)
        return builder.extract_element(lanes, ir.Constant(ir.IntType(32), 0))

    return types.float32(floats), codegen


@intrinsic
def half_to_float(typingctx, bits):
    """The float32 value of a float16 given by its bits."""

    def codegen(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@numba.njit(nogil=True, cache=True)
def sign_rows(words, x, totals, scale, y, start, stop, accumulate):
    """y[b, i] (+)= scale[i] * sum_j sign[i, j] x[b, j] for start <= i < stop and every b.

    words : (m, 2 * words a row) uint16; x : (batch, 16 * halfwords) float32, zero beyond the last sign;
    totals : (batch,) float32, the sum of each row of x; scale : (m,) uint16 bits of float16; y : (batch, >= m) float32.
    """
    halves = words.shape[1]
    flat, flat_x = words.reshape(-1), x.reshape(-1)
    stride = x.shape[1]
    batch = x.shape[0]
    done = 0
    while done + 4 <= batch:
        x0, x1, x2, x3 = done * stride, (done + 1) * stride, (done + 2) * stride, (done + 3) * stride
        i = start
        while i < stop:
            row0 = i * halves
            row1 = row0 + halves if i + 1 < stop else row0
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = zeros()
            for k in range(halves):
                lanes0, lanes1 = load(flat_x, x0 + k * LANES), load(flat_x, x1 + k * LANES)
                lanes2, lanes3 = load(flat_x, x2 + k * LANES), load(flat_x, x3 + k * LANES)
                a0, a1 = add_where(a0, flat, row0 + k, lanes0), add_where(a1, flat, row0 + k, lanes1)
                a2, a3 = add_where(a2, flat, row0 + k, lanes2), add_where(a3, flat, row0 + k, lanes3)
                b0, b1 = add_where(b0, flat, row1 + k, lanes0), add_where(b1, flat, row1 + k, lanes1)
                b2, b3 = add_where(b2, flat, row1 + k, lanes2), add_where(b3, flat, row1 + k, lanes3)
            if i + 1 < stop:
                put(y, done, i + 1, b0, totals, scale, accumulate)
                put(y, done + 1, i + 1, b1, totals, scale, accumulate)
                put(y, done + 2, i + 1, b2, totals, scale, accumulate)
                put(y, done + 3, i + 1, b3, totals, scale, accumulate)
            put(y, done, i, a0, totals, scale, accumulate)
            put(y, done + 1, i, a1, totals, scale, accumulate)
            put(y, done + 2, i, a2, totals, scale, accumulate)
            put(y, done + 3, i, a3, totals, scale, accumulate)
            i += 2
        done += 4
    for b in range(done, batch):
        sign_rows_of_one(flat, halves, flat_x, b, stride, totals, scale, y, start, stop, accumulate)


@numba.njit(nogil=True, cache=True)
def sign_rows_of_one(flat, halves, flat_x, b, stride, totals, scale, y, start, stop, accumulate):
    """`sign_rows` for row b of x alone, four rows of signs at a time."""
    x0 = b * stride
    i = start
    while i + 4 <= stop:
        row = i * halves
        a0 = a1 = a2 = a3 = zeros()
        for k in range(halves):
            lanes = load(flat_x, x0 + k * LANES)
            a0 = add_where(a0, flat, row + k, lanes)
            a1 = add_where(a1, flat, row + halves + k, lanes)
            a2 = add_where(a2, flat, row + 2 * halves + k, lanes)
            a3 = add_where(a3, flat, row + 3 * halves + k, lanes)
        put(y, b, i, a0, totals, scale, accumulate)
        put(y, b, i + 1, a1, totals, scale, accumulate)
        put(y, b, i + 2, a2, totals, scale, accumulate)
        put(y, b, i + 3, a3, totals, scale, accumulate)
        i += 4
    while i < stop:
        a0 = zeros()
        for k in range(halves):
            a0 = add_where(a0, flat, i * halves + k, load(flat_x, x0 + k * LANES))
        put(y, b, i, a0, totals, scale, accumulate)
        i += 1


@numba.njit(nogil=True, cache=True, inline="always")
def put(y, b, i, negative, totals, scale, accumulate):
    """Finish one dot product: y[b, i] (+)= scale[i] * (total - 2 * the sum over set bits)."""
    value = half_to_float(scale[i]) * (totals[b] - np.float32(2) * lane_sum(negative))
    y[b, i] = y[b, i] + value if accumulate else value


@numba.njit(nogil=True, cache=True)
def scaled_rows(x, scale, width):
    """Multiply x by scale, into rows of `width` columns, zero beyond the last, and the sum of each row."""
    batch, d_in = x.shape
    scaled = np.zeros((batch, width), np.float32)
    totals = np.empty(batch, np.float32)
    flat_x, flat_scaled = x.reshape(-1), scaled.reshape(-1)
    whole = d_in // LANES * LANES
    for b in range(batch):
        sums = zeros()
        for j in range(0, whole, LANES):
            lanes = multiply(load(flat_x, b * d_in + j), load_half(scale, j))
            store(flat_scaled, b * width + j, lanes)
            sums = add(sums, lanes)
        totals[b] = lane_sum(sums)
        for j in range(whole, d_in):
            scaled[b, j] = x[b, j] * half_to_float(scale[j])
            totals[b] += scaled[b, j]
    return scaled, totals


@numba.njit(nogil=True, cache=True)
def row_sums(t, totals):
    """Fill totals with the sum of each row of t, always in the same order; a row is a whole number of lanes."""
    flat = t.reshape(-1)
    for b in range(t.shape[0]):
        sums = zeros()
        for j in range(b * t.shape[1], (b + 1) * t.shape[1], LANES):
            sums = add(sums, load(flat, j))
        totals[b] = lane_sum(sums)


@numba.njit(nogil=True, cache=True)
def path_serial(x, u_words, v_words, h, ell, g, y, accumulate):
    """One path on one thread: y (+)= ((((x * g) V_sign) * ell) U_sign^T) * h."""
    scaled, totals = scaled_rows(x, g, v_words.shape[1] * LANES)
    t = np.zeros((x.shape[0], u_words.shape[1] * LANES), np.float32)
    sign_rows(v_words, scaled, totals, ell, t, 0, v_words.shape[0], False)
    row_sums(t, totals)
    sign_rows(u_words, t, totals, h, y, 0, u_words.shape[0], accumulate)


@numba.njit(nogil=True, cache=True, parallel=True)
def path_parallel(x, u_words, v_words, h, ell, g, y, accumulate):
    """`path_serial` with the rows of signs divided among Numba's threads."""
    scaled, totals = scaled_rows(x, g, v_words.shape[1] * LANES)
    t = np.zeros((x.shape[0], u_words.shape[1] * LANES), np.float32)
    rank, d_out = v_words.shape[0], u_words.shape[0]
    for task in numba.prange(-(-rank // ROWS_PER_TASK)):
        start = task * ROWS_PER_TASK
        sign_rows(v_words, scaled, totals, ell, t, start, min(rank, start + ROWS_PER_TASK), False)
    row_sums(t, totals)
    for task in numba.prange(-(-d_out // ROWS_PER_TASK)):
        start = task * ROWS_PER_TASK
        sign_rows(u_words, t, totals, h, y, start, min(d_out, start + ROWS_PER_TASK), accumulate)


threads = threading.local()


def packed_linear(x: Tensor, paths: Sequence[PackedFactors]) -> Tensor:
    """`kernels.packed_linear` for tensors on the CPU, on at most torch.get_num_threads() threads."""
    rows = x.detach().to(torch.float32).contiguous().numpy()  # (batch, d_in)
    y = torch.empty(len(rows), paths[0].h.shape[0])
    out = y.numpy()
    for order, path in enumerate(paths):
        work = len(rows) * path.ell.shape[0] * (path.h.shape[0] + path.g.shape[0])
        kernel = path_parallel if use_threads(work) else path_serial
        kernel(
            rows,
            halfwords(path.u_words),
            halfwords(path.v_words),
            half_bits(path.h),
            half_bits(path.ell),
            half_bits(path.g),
            out,
            order > 0,
        )
    return y


def use_threads(work: int) -> bool:
    """Whether `work` sign additions are worth several threads; if so, Numba's number of threads is set to torch's."""
    count = min(torch.get_num_threads(), MAX_THREADS)
    if count == 1 or work < PARALLEL_WORK:
        return False
    if getattr(threads, "count", None) != count:  # setting it costs more than a small layer
        numba.set_num_threads(count)
        threads.count = count
    return True


def halfwords(words: Tensor) -> np.ndarray:
    """Words as uint16, sixteen signs each, least significant first."""
    return words.contiguous().numpy().view("<u2")


def half_bits(scale: Tensor) -> np.ndarray:
    """Bits of float16 scales, which Numba cannot read as numbers on a CPU."""
    return scale.to(torch.float16).contiguous().numpy().view(np.uint16)
