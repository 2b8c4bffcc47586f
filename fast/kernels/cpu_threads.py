"""Threads that share a packed layer, a head or attention on a CPU, of which none is waited for long.

The thread that decodes posts a job to each helper that is ready, does its own part, and collects theirs. A machine that
is busy with other programs may stop any thread at any moment, for milliseconds; a barrier would wait for it. Here

- a job goes only to a helper that has just said that it is READY, so one that does not run gets no part;
- a part that its helper has not begun by the time it is needed, or does not end soon after, is TAKEN back: the caller
  does it itself, and the late one finds out when it is done;
- a helper writes to its own space, and the caller copies what is DONE; so one that is late spoils nothing;
- a helper that finds no job for a while sleeps in a read of a pipe, until a caller with a job writes to it;
- a helper runs at a low priority, for where every core is busy it only takes time from its caller.

ASLEEP -> WOKEN -> READY -> POSTED -> RUNNING -> DONE -> READY, and from POSTED or RUNNING over TAKEN to READY. Each
step is one compare-and-swap of a word that the two threads share. A hand-over costs about two transfers of a line. A
helper never holds Python's lock: whoever holds that while it does not run stops its caller.

A result does not depend on the number of threads, nor on who did which part: each output is the same sum, in the same
order. Bytes moved: those of the kernels, and twice the outputs of helpers.
"""
# pyright: reportCallIssue=false, reportPrivateImportUsage=false

import atexit
import contextlib
import functools
import os
import sys
import threading
import time
from typing import Any

import numba
import numpy as np
from numba import types

from .cpu import PATH_NUMBERS, RANK, U, aligned, ask_for, first_stage, floats_at, layer_rows, path_starts, second_stage
from .cpu_dense import attend, head_rows
from .cpu_simd import LANES, address_of, atomic_load, atomic_store, call, compare_and_swap, pause, pointer

MAX_THREADS: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
PARALLEL_WORK = 1 << 19  # sign additions, or products, below which a second thread costs more than it brings
PIECE_WORK = 1 << 22  # of a part that is posted at once, where parts can be that small
SIGNS_A_PRODUCT = 8  # sign additions in the time of a product with a dense weight
LATE_S = 100e-6  # after this a part is taken back
IDLE_S = 100e-6  # after this a helper sleeps
NICE = 10  # added to a helper's niceness

# What waits without Python's lock: the system's functions for pipes
UNDERSCORE = "_" if sys.platform == "win32" else ""
PIPE_CALL = types.intp(types.intp, types.intp, types.intp)
read = types.ExternalFunction(f"{UNDERSCORE}read", PIPE_CALL)
write = types.ExternalFunction(f"{UNDERSCORE}write", PIPE_CALL)

ASLEEP, WOKEN, READY, POSTED, RUNNING, DONE, TAKEN = range(7)

# A thread's row of numbers: its state alone in a cache line, then its job. Row 0 is the caller's.
WIDTH = 40
STATE = 0
RUN, OUT, HAS_PART, CLOSED, READ, WRITE = range(8, 14)  # address of `run`; of a helper's results; flags; its pipe
LATE, WORTH, SPACE, MULTIPLE, PIECE = range(9, 14)  # of the caller, see `divide` and `Pool`
# A job: items START to STOP, each UNIT floats of the result, in SEGMENTS rows of it that are STRIDE floats apart
KIND, START, STOP, UNIT, SEGMENTS, STRIDE = range(16, 22)
X = 22  # address of the input
KERNEL, PATHS, PATH_COUNT, D_OUT, D_IN, T, EACH = range(23, 30)  # of a packed layer; EACH: rows of x at a time
TABLE, SIZE = 23, 28  # of a head: the five numbers of its table; entries of a row
KEYS, VALUES, POSITION, HEADS, KV_HEADS, HEAD_DIM, CAPACITY = range(23, 30)  # of attention
JOB_END = 30

FIRST, SECOND, ROWS, HEAD, ATTENTION = range(5)  # kinds of jobs
FOUR = 4  # rows of x that share lookups


@numba.njit(nogil=True, cache=True, inline="always")
def first_part(job, paths, t, each):
    """Rows START to STOP of V_sign of all paths, one after the other, times x: few paths a thread, so few tables."""
    starts, d_in, d_out = path_starts(paths), job[D_IN], job[D_OUT]
    total = starts[-1]
    x = floats_at(job[X], len(each) * d_in)
    for order in range(len(paths)):  # the second stage's words come meanwhile
        width = (paths[order, RANK] + 31) // 32
        begin, end = d_out * job[START] // total, d_out * job[STOP] // total
        ask_for(paths[order, U] + 4 * width * begin, 4 * width * (end - begin))
    for order in range(len(paths)):
        start, stop = max(job[START] - starts[order], 0), min(job[STOP] - starts[order], paths[order, RANK])
        if start < stop:
            first_stage(job[KERNEL], paths[order], d_in, x, start, stop, t[starts[order] :], total, each)


@numba.njit(nogil=True, cache=True, inline="always")
def second_part(job, paths, y, each):
    """Outputs START to STOP of all paths."""
    starts, d_out = path_starts(paths), job[D_OUT]
    total = starts[-1]
    t = floats_at(job[T], len(each) * total)
    for order in range(len(paths)):
        mine = t[starts[order] :]
        second_stage(job[KERNEL], paths[order], d_out, mine, total, job[START], job[STOP], y, order > 0, each)


@numba.njit(nogil=True, cache=True, inline="always")
def rows_part(job, paths, y, each):
    """Whole rows of y, as many at a time as share lookups."""
    d_out, d_in, rows = job[D_OUT], job[D_IN], len(each)
    x = floats_at(job[X], rows * job[STOP] * d_in)
    for b in range(rows * job[START], rows * job[STOP], rows):
        layer_rows(job[KERNEL], paths, d_out, d_in, x[b * d_in :], y[b * d_out :], each)


@numba.njit(nogil=True, cache=True)
def layer_part(job, out, each):
    """A part of a packed layer's job, for a few rows of x that share lookups."""
    paths = numba.carray(pointer(job[PATHS]), (job[PATH_COUNT], PATH_NUMBERS), np.int64)
    result = floats_at(out, job[SEGMENTS] * job[STRIDE])
    if job[KIND] == ROWS:
        rows_part(job, paths, result, each)
    elif job[KIND] == FIRST:
        first_part(job, paths, result, each)
    else:
        second_part(job, paths, result, each)


@numba.njit(nogil=True, cache=True)
def attention_part(job, out):
    """Heads START to STOP of a block of tokens, counted token after token; each looks at what is not after it."""
    heads, size, capacity = job[HEADS], job[HEAD_DIM], job[CAPACITY]
    scores = aligned(job[POSITION] + job[STOP] // heads + 1 + 2 * LANES)
    for at in range(job[START], job[STOP]):
        place = 4 * size * capacity * (at % heads // (heads // job[KV_HEADS]))
        length = job[POSITION] + at // heads + 1
        q = job[X] + 4 * at * size
        attend(q, job[KEYS] + place, job[VALUES] + place, length, size, scores, out + 4 * at * size)


def run(place, out):
    """Do the job in the row at an address; `out` is the address of all of the result, items START to STOP are written.

    Compiled once and called by its address: Numba would optimise all of it again in everything that calls it by name.
    """
    job = numba.carray(pointer(place), (WIDTH,), np.int64)
    if job[KIND] == HEAD:
        head_rows(job[TABLE:], job[X], job[SIZE], floats_at(out, job[STOP]), job[START], job[STOP])
    elif job[KIND] == ATTENTION:
        attention_part(job, out)
    elif job[EACH] == FOUR:
        layer_part(job, out, (0, 0, 0, 0))
    else:
        layer_part(job, out, (0,))


@functools.cache
def run_address() -> int:
    """The address of `run`, which is compiled on first use."""
    return numba.cfunc("void(int64, int64)", nopython=True, cache=True)(run).address


@numba.njit(nogil=True, cache=True)
def serve(row, patience):
    """Do the jobs that are posted to a helper's row until none has come for so many pauses; whether it may sleep."""
    state, idle = address_of(row), 0
    while idle < patience:
        now = atomic_load(state)
        if now == POSTED and compare_and_swap(state, POSTED, RUNNING):
            call(row[RUN], state, row[OUT])
            if not compare_and_swap(state, RUNNING, DONE):  # it was taken back
                atomic_store(state, READY)
            idle = 0
        elif now == TAKEN:
            atomic_store(state, READY)
        else:
            pause()
            idle += 1
    return compare_and_swap(state, READY, ASLEEP)


@numba.njit(nogil=True, cache=True)
def live(row, patience):
    """A helper's life: sleep, look for jobs, sleep again; until the row says CLOSED."""
    state, byte = address_of(row), np.zeros(1, np.uint8)
    while not atomic_load(state + 8 * CLOSED):
        read(row[READ], address_of(byte), 1)
        if compare_and_swap(state, WOKEN, READY):
            while not serve(row, patience):  # its caller was stopped before it could collect
                pass


@numba.njit(nogil=True, cache=True)
def wake(team, row):
    """Wake the helper of a row if it is asleep."""
    if compare_and_swap(address_of(team) + 8 * row, ASLEEP, WOKEN):
        write(team[row + WRITE], address_of(team), 1)


@numba.njit(nogil=True, cache=True)
def post(team, row, start, stop):
    """Give items of the caller's job to the helper of a row; False if it has fallen asleep."""
    for at in range(KIND, JOB_END):
        team[row + at] = team[at]
    team[row + START], team[row + STOP] = start, stop
    return compare_and_swap(address_of(team) + 8 * row, READY, POSTED)


@numba.njit(nogil=True, cache=True)
def collect(team, row, result):
    """Copy a helper's part to its place in the result, or do it if the helper has not begun or is late."""
    state, waited = address_of(team) + 8 * row, 0
    while True:
        now = atomic_load(state)
        if now == DONE:
            break
        if (now == POSTED or waited > team[LATE]) and compare_and_swap(state, now, TAKEN):
            call(team[RUN], state, result)
            return
        pause()
        waited += 1
    unit, stride = team[row + UNIT], team[row + STRIDE]
    first, size = unit * team[row + START], unit * (team[row + STOP] - team[row + START])
    for b in range(team[row + SEGMENTS]):
        place = 4 * (b * stride + first)
        source, target = floats_at(team[row + OUT] + place, size), floats_at(result + place, size)
        for j in range(size):
            target[j] = source[j]
    atomic_store(state, READY)


@numba.njit(nogil=True, cache=True)
def alone(team, result, start, stop):
    """Items of the caller's job, done by the caller."""
    if start < stop:
        team[START], team[STOP] = start, stop
        call(team[RUN], address_of(team), result)


@numba.njit(nogil=True, cache=True)
def divide(team, result, items):
    """Do the job in the caller's row: its items are divided among the caller and the helpers that are ready.

    team : flat int64, WIDTH numbers a thread; result : address. Bounds of parts are multiples of the row's MULTIPLE; a
    thread gets PIECE items at once.
    """
    place, start = address_of(team), np.int64(0)
    while start < items:
        parts = np.int64(1)
        for row in range(WIDTH, len(team), WIDTH):
            parts += atomic_load(place + 8 * row) == READY
            wake(team, row)
        size = min(items - start, team[PIECE] * parts)
        blocks = (size + team[MULTIPLE] - 1) // team[MULTIPLE]
        given = np.int64(1)  # the first part is the caller's
        for row in range(WIDTH, len(team), WIDTH):
            team[row + HAS_PART] = 0
            begin = min(size, blocks * given // parts * team[MULTIPLE])
            end = min(size, blocks * (given + 1) // parts * team[MULTIPLE])
            if given < parts and begin < end and atomic_load(place + 8 * row) == READY:
                team[row + HAS_PART] = post(team, row, start + begin, start + end)
                given += team[row + HAS_PART]
        alone(team, result, start, start + min(size, blocks // parts * team[MULTIPLE]))
        alone(team, result, start + min(size, blocks * given // parts * team[MULTIPLE]), start + size)  # nobody's
        for row in range(WIDTH, len(team), WIDTH):
            if team[row + HAS_PART]:
                collect(team, row, result)
        start += size


@numba.njit(nogil=True, cache=True)
def divided_rows(team, total, y):
    """`cpu.layer_rows` with the rows of signs divided; `total` of them in V_sign, padded."""
    team[T], team[UNIT], team[SEGMENTS], team[MULTIPLE] = team[SPACE], 1, team[EACH], LANES
    team[KIND], team[STRIDE], team[PIECE] = FIRST, total, total
    divide(team, team[SPACE], total)
    team[KIND], team[STRIDE], team[PIECE] = SECOND, team[D_OUT], team[D_OUT]
    divide(team, y, team[D_OUT])


@numba.njit(nogil=True, cache=True)
def divided_layer(team, kernel, paths, d_out, d_in, x, y, rows):
    """Y = W_hat x for each row of x, on all threads of a team where that is worth it; x and y are addresses.

    Threads divide the rows of x, in groups of four that share lookups, and then those that are left; of large layers
    what cannot be divided so is divided by rows of signs.
    """
    work, total, threads = np.int64(0), path_starts(paths)[-1], len(team) // WIDTH
    for order in range(len(paths)):
        work += paths[order, RANK] * (d_out + d_in)
    team[KERNEL], team[PATHS], team[PATH_COUNT] = kernel, address_of(paths.ravel()), len(paths)
    team[D_OUT], team[D_IN] = d_out, d_in
    b = np.int64(0)
    for each in (FOUR, 1):
        groups = (rows - b) // each
        team[EACH], team[X] = each, x + 4 * b * d_in
        whole = groups if threads == 1 or each * work < team[WORTH] else groups // threads * threads
        team[KIND], team[UNIT], team[SEGMENTS], team[STRIDE] = ROWS, each * d_out, 1, whole * each * d_out
        team[MULTIPLE], team[PIECE] = 1, max(1, PIECE_WORK // (each * work))
        if threads == 1 or whole * each * work < team[WORTH]:
            alone(team, y + 4 * b * d_out, 0, whole)
        else:
            divide(team, y + 4 * b * d_out, whole)
        b += whole * each
        for _ in range(whole, groups):
            team[X] = x + 4 * b * d_in
            divided_rows(team, total, y + 4 * b * d_out)
            b += each


@numba.njit(nogil=True, cache=True)
def layer(team, kernel, plan, d_out, d_in, x, y, rows):
    """`divided_layer` of a plan: six numbers for each path."""
    divided_layer(team, kernel, plan.reshape(-1, PATH_NUMBERS), d_out, d_in, x, y, rows)


@numba.njit(nogil=True, cache=True)
def divided_head(team, table, x, size, logits, rows):
    """`cpu_dense.head_rows` for all rows, divided among the threads of a team; x and logits are addresses."""
    for at in range(len(table)):
        team[TABLE + at] = table[at]
    team[KIND], team[X], team[SIZE], team[UNIT], team[SEGMENTS], team[STRIDE] = HEAD, x, size, 1, 1, rows
    team[MULTIPLE], team[PIECE] = FOUR, max(FOUR, 2 * PIECE_WORK // (SIGNS_A_PRODUCT * size))
    if len(team) == WIDTH or SIGNS_A_PRODUCT * rows * size < team[WORTH]:
        alone(team, logits, 0, rows)
    else:
        divide(team, logits, rows)


@numba.njit(nogil=True, cache=True)
def divided_attention(team, q, keys, values, position, count, heads, out):
    """Attention of all heads of a block of tokens, divided among the threads of a team.

    q, out : flat, (count, heads, head_dim); keys, values : (kv_heads, capacity, head_dim), filled up to the last token.
    """
    kv_heads, capacity, size = keys.shape
    work = 2 * SIGNS_A_PRODUCT * size * (position + count)  # at most, of a head of a token
    team[KIND], team[X], team[UNIT], team[SEGMENTS], team[STRIDE] = ATTENTION, address_of(q), size, 1, len(out)
    team[KEYS], team[VALUES], team[POSITION] = address_of(keys.ravel()), address_of(values.ravel()), position
    team[HEADS], team[KV_HEADS], team[HEAD_DIM], team[CAPACITY] = heads, kv_heads, size, capacity
    team[MULTIPLE], team[PIECE] = 1, max(1, PIECE_WORK // work)
    if len(team) == WIDTH or count * heads * work < team[WORTH]:
        alone(team, address_of(out), 0, count * heads)
    else:
        divide(team, address_of(out), count * heads)


def default_threads() -> int:
    """How many threads torch may use, at most Numba's; OMP_NUM_THREADS, or all, in a process without torch."""
    torch = sys.modules.get("torch")
    if torch:
        return min(torch.get_num_threads(), MAX_THREADS)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(int(asked), MAX_THREADS) if asked.isdecimal() and int(asked) else MAX_THREADS


def aligned_zeros(size: int, dtype: Any) -> np.ndarray:
    """An array that begins on a cache line."""
    itemsize = np.dtype(dtype).itemsize
    space = np.zeros(size + 64 // itemsize, dtype)
    skip = (-space.ctypes.data & 63) // itemsize
    return space[skip : skip + size]


def row_alone() -> np.ndarray:
    """The team of a caller without helpers."""
    row = np.zeros(WIDTH, np.int64)
    row[RUN] = run_address()
    return row


class Helper(threading.Thread):
    """A thread that does the jobs in its row.

    Parameters
    ----------
    row : (WIDTH,) int64 array
    patience : int
        Pauses without a job after which it sleeps.

    Attributes
    ----------
    kept : list
        What its job reads and writes; kept for as long as it may be late with one.
    """

    def __init__(self, row: np.ndarray, patience: int):
        super().__init__(name="littlebit-helper", daemon=True)
        self.row, self.patience, self.kept = row, patience, []
        self.out = aligned_zeros(0, np.float32)
        self.pipe = os.pipe()
        row[STATE], row[CLOSED], row[RUN] = ASLEEP, 0, run_address()
        row[READ], row[WRITE] = self.pipe

    def run(self) -> None:
        """Help, at a low priority where a thread has one of its own."""
        if sys.platform == "linux":
            thread = threading.get_native_id()
            with contextlib.suppress(OSError):  # where a system forbids it
                os.setpriority(os.PRIO_PROCESS, thread, min(os.getpriority(os.PRIO_PROCESS, thread) + NICE, 19))
        live(self.row, self.patience)

    def close(self) -> None:
        """End it."""
        self.row[CLOSED] = 1
        os.write(self.pipe[1], b"x")
        self.join()
        self.close_pipe()

    def close_pipe(self) -> None:
        """Give its files back."""
        for end in self.pipe:
            os.close(end)

    def late(self) -> bool:
        """Whether it may still be at work on a job that was taken back."""
        return self.row[STATE] == TAKEN

    def room(self, floats: int) -> None:
        """Give it space for results."""
        if len(self.out) < floats:
            self.out = aligned_zeros(floats, np.float32)
            self.row[OUT] = self.out.ctypes.data


class Pool:
    """The helpers of this process; one Python thread at a time uses them, the others do without."""

    def __init__(self) -> None:
        self.busy = threading.Lock()
        self.team = aligned_zeros(MAX_THREADS * WIDTH, np.int64)
        self.space = aligned_zeros(0, np.float32)
        self.helpers: list[Helper] = []
        self.pauses_per_s = 0.0

    def start(self, count: int) -> int:
        """Start helpers until there are `count`, or as many as the system allows; how many of them there are."""
        if not self.pauses_per_s:
            self.pauses_per_s = pauses_per_second()
            self.team[LATE] = int(LATE_S * self.pauses_per_s)
            self.team[RUN] = run_address()
        while len(self.helpers) < count:
            at = WIDTH * (len(self.helpers) + 1)
            try:
                helper = Helper(self.team[at : at + WIDTH], int(IDLE_S * self.pauses_per_s))
            except OSError:  # too many files are open
                break
            try:
                helper.start()
            except RuntimeError:  # too many threads run
                helper.close_pipe()
                break
            self.helpers.append(helper)
        return min(count, len(self.helpers))

    def room(self, count: int, floats: int) -> None:
        """Space for as many floats for the caller and `count` helpers, once nobody writes to what they had."""
        helpers = self.helpers[:count]
        if len(self.space) >= floats and all(len(helper.out) >= floats for helper in helpers):
            return
        while any(helper.late() for helper in self.helpers):
            time.sleep(IDLE_S)
        if len(self.space) < floats:
            self.space = aligned_zeros(floats, np.float32)
            self.team[SPACE] = self.space.ctypes.data
        for helper in helpers:
            helper.room(floats)

    def close(self) -> None:
        """End all helpers."""
        while self.helpers:
            self.helpers.pop().close()


def pauses_per_second() -> float:
    """How often a helper that is ready looks for a job in a second; the most of several tries, as others may run."""
    row, count, best = np.zeros(WIDTH, np.int64), 2000, 0.0
    for _ in range(5):
        row[STATE] = READY
        start = time.perf_counter()
        serve(row, count)
        best = max(best, count / (time.perf_counter() - start))
    return best


pool = Pool()


def close_pool() -> None:
    """End the helpers of this process, before what they look at goes."""
    pool.close()


def after_fork() -> None:
    """Give a child that was forked helpers of its own, which it starts when it needs them.

    It has none of its parent's threads, and none of OpenMP's: torch's own products would wait for those.
    """
    global pool
    started, pool = pool.helpers, Pool()
    for helper in started:
        helper.close_pipe()
    if started and (torch := sys.modules.get("torch")):
        torch.set_num_threads(1)  # as torch does in the workers of a DataLoader


atexit.register(close_pool)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=after_fork)


class Team:
    """Up to so many threads for the kernels in a `with` block, all by default; one if another Python thread has them.

    Entering gives the numbers that the kernels take as `team`. (A generator as the context manager would take as long
    as a small layer.)

    Parameters
    ----------
    wanted : int, optional
    floats : int
        Of the largest result or intermediate that is divided.
    kept : object
        What holds everything that the kernels read in the block; it is kept until no helper is late with it.
    """

    def __init__(self, wanted: int | None = None, floats: int = 0, kept: Any = None):
        self.count = default_threads() if wanted is None else min(wanted, MAX_THREADS)
        self.floats, self.kept, self.pool = floats, kept, pool

    def __enter__(self) -> np.ndarray:
        """WIDTH numbers for each of the threads that the block may use."""
        helpers = self.pool
        if self.count < 2 or not helpers.busy.acquire(blocking=False):
            self.count = 1
            return row_alone()
        try:
            self.mine = helpers.helpers[: helpers.start(self.count - 1)]
            helpers.room(len(self.mine), self.floats)
        except BaseException:
            helpers.busy.release()
            raise
        helpers.team[WORTH] = PARALLEL_WORK
        for helper in self.mine:
            helper.kept.append(self.kept)
        return helpers.team[: WIDTH * (1 + len(self.mine))]

    def __exit__(self, *error: object) -> None:
        """Leave them to others."""
        if self.count > 1:
            for helper in self.mine:
                if not helper.late():
                    helper.kept.clear()
            self.pool.busy.release()
