"""Divide a packed layer, a head or attention among CPU threads, without a barrier.

What this adds to cpu.py: the rows of a matrix (or of x, or heads) are divided among the calling thread and helper
threads. A barrier would make every thread wait for the slowest. On a machine that is busy with other programs the
system may stop any thread for milliseconds, and a barrier then waits for a thread that does not run. So here nobody
waits long for anybody:

- A job goes only to a helper that has just reported READY, so a helper that does not run gets no share.
- If a helper has not begun its share when the caller needs it, or does not end it soon after, the share is RECLAIMED:
  the caller computes it, and the late helper finds out when it is done.
- A helper writes to its own memory, and the caller copies a share that is DONE. A late helper can therefore spoil
  nothing, and no two threads write to one cache line (no false sharing). State words have a line of their own.
- Helpers spin, then sleep: a helper without a job spins for IDLE_S, then blocks in a read of a pipe until a caller with
  a job writes to it.
- Helpers run at a low priority: where every core is busy, a helper would only take time from its caller.
- If more than one share in LATE_COST is late, the caller works alone for ALONE_JOBS jobs and then tries again: a late
  share costs more time than a few punctual ones save. A large job counts as several, by its work.

The state of a helper goes ASLEEP -> WOKEN -> READY -> POSTED -> RUNNING -> DONE -> READY, or from POSTED or RUNNING to
RECLAIMED and back to READY. Each step is one compare-and-swap of a word that the helper and its caller share, so that
handing over a job costs about two transfers of a cache line. Helpers never hold Python's global interpreter lock.

Results do not depend on the number of threads, nor on which thread computed what: rows are divided, never the columns
that a sum runs over (no split-K), so each output is the same sum in the same order.

**Bytes read**: the same as on one thread, and in addition each output of a helper is written and read once more, 8
bytes. **Limit**: threads share the memory bandwidth and, on many machines, the clock. On a 28672 x 8192 layer of 0.55
bits two cores are 1.70 times faster than one, where two loops that share nothing reach 1.94; on 4096 x 4096 at 0.1 bits
1.25 (book/results/cpu_linear_threads.json).
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

from ...reference.arrays import Array
from .cpu import (
    PATH_FIELDS,
    RANK,
    U,
    aligned_empty,
    first_stage,
    floats_at,
    layer_rows,
    path_offsets,
    prefetch_range,
    second_stage,
)
from .cpu_dense import attend, head_rows
from .cpu_simd import LANES, address_of, atomic_load, atomic_store, call_address, compare_and_swap, pause, pointer

MAX_THREADS: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
#: Sign additions (or products, weighted) below which a second thread costs more time than it saves.
PARALLEL_WORK = 1 << 19
GRAIN_WORK = 1 << 22  # sign additions of a share: larger jobs are handed out in several rounds
SIGNS_PER_PRODUCT = 8  # sign additions in the time of one product with a dense weight
# How long the caller waits for a share of GRAIN_WORK that its helper has begun: about as long as computing it takes. A
# larger share is waited for in proportion. A caller that gave up earlier would compute most shares of a prompt twice.
LATE_S = 100e-6
# How long a helper without a job spins before it sleeps. Between two jobs of a prompt the caller works alone for tenths
# of a millisecond. A helper that sleeps there wakes too late for the next job, and the second thread adds nothing.
IDLE_S = 20e-3
LATE_COST = 8  # punctual shares that make up for a late one
MAX_CREDIT = 64  # punctual shares that are remembered
ALONE_JOBS = 512  # jobs of at most GRAIN_WORK that the caller then does alone, about six tokens of SmolLM2-135M
NICE = 10  # added to a helper's niceness

# A helper sleeps in the system's read() of a pipe, called from compiled code, which does not hold Python's lock.
UNDERSCORE = "_" if sys.platform == "win32" else ""
PIPE_CALL = types.intp(types.intp, types.intp, types.intp)
read = types.ExternalFunction(f"{UNDERSCORE}read", PIPE_CALL)
write = types.ExternalFunction(f"{UNDERSCORE}write", PIPE_CALL)

ASLEEP, WOKEN, READY, POSTED, RUNNING, DONE, RECLAIMED = range(7)

# A team is a flat int64 array, one mailbox of MAILBOX numbers for each thread; the caller's comes first. The state word
# has the first cache line to itself, since another thread polls it.
MAILBOX = 40
STATE = 0
# Both: address of `run_job`. A helper's: address of its results; whether it has a share; whether to end; its pipe.
RUN, OUT, HAS_SHARE, CLOSED, PIPE_READ, PIPE_WRITE = range(8, 14)
# The caller's: pauses after which a share of GRAIN_WORK is late; least work to divide; address of scratch memory;
# shares begin at multiples of MULTIPLE items; items of a share, at most; work of a share / GRAIN_WORK, at least 1;
# jobs of GRAIN_WORK to do alone; punctual shares that make up for late ones.
LATE, MIN_WORK, SCRATCH, MULTIPLE, GRAIN, GRAINS, ALONE, CREDIT = range(9, 17)
# A job: items START to STOP, each UNIT floats of the result, which has SEGMENTS rows that are STRIDE floats apart.
KIND, START, STOP, UNIT, SEGMENTS, STRIDE = range(17, 23)
X = 23  # address of the input
KERNEL, PATHS, PATH_COUNT, D_OUT, D_IN, T, BATCH = range(24, 31)  # of a packed layer; BATCH: rows of x at a time
TABLE, SIZE = 24, 29  # of a head: the five numbers of its table; entries of a row
KEYS, VALUES, POSITION, HEADS, KV_HEADS, HEAD_DIM, CAPACITY = range(24, 31)  # of attention
JOB_END = 31

FIRST, SECOND, ROWS, HEAD, ATTENTION = range(5)  # kinds of jobs
BATCH_TILE = 4  # rows of x that share lookups


# What a job computes


@numba.njit(nogil=True, cache=True, inline="always")
def run_first_stage(job, paths, t, batch):
    """Compute ranks START to STOP of t = V_sign^T (g x), the ranks of all paths laid end to end.

    A thread gets the ranks of few paths, so it makes the lookup tables of few.
    """
    offsets, d_in, d_out = path_offsets(paths), job[D_IN], job[D_OUT]
    total = offsets[-1]
    x = floats_at(job[X], len(batch) * d_in)
    for order in range(len(paths)):  # prefetch the words that this thread will read in the second stage
        width = (paths[order, RANK] + 31) // 32
        begin, end = d_out * job[START] // total, d_out * job[STOP] // total
        prefetch_range(paths[order, U] + 4 * width * begin, 4 * width * (end - begin))
    for order in range(len(paths)):
        start, stop = max(job[START] - offsets[order], 0), min(job[STOP] - offsets[order], paths[order, RANK])
        if start < stop:
            first_stage(job[KERNEL], paths[order], d_in, x, start, stop, t[offsets[order] :], total, batch)


@numba.njit(nogil=True, cache=True, inline="always")
def run_second_stage(job, paths, y, batch):
    """Compute outputs START to STOP, the sum over all paths."""
    offsets, d_out = path_offsets(paths), job[D_OUT]
    total = offsets[-1]
    t = floats_at(job[T], len(batch) * total)
    for order in range(len(paths)):
        mine = t[offsets[order] :]
        second_stage(job[KERNEL], paths[order], d_out, mine, total, job[START], job[STOP], y, order > 0, batch)


@numba.njit(nogil=True, cache=True, inline="always")
def run_rows(job, paths, y, batch):
    """Compute all outputs of some rows of x, len(batch) rows at a time."""
    d_out, d_in, rows = job[D_OUT], job[D_IN], len(batch)
    x = floats_at(job[X], rows * job[STOP] * d_in)
    for b in range(rows * job[START], rows * job[STOP], rows):
        layer_rows(job[KERNEL], paths, d_out, d_in, x[b * d_in :], y[b * d_out :], batch)


@numba.njit(nogil=True, cache=True)
def run_layer(job, out, batch):
    """Do a share of a packed layer's job, for a few rows of x that share lookups."""
    paths = numba.carray(pointer(job[PATHS]), (job[PATH_COUNT], PATH_FIELDS), np.int64)
    result = floats_at(out, job[SEGMENTS] * job[STRIDE])
    if job[KIND] == ROWS:
        run_rows(job, paths, result, batch)
    elif job[KIND] == FIRST:
        run_first_stage(job, paths, result, batch)
    else:
        run_second_stage(job, paths, result, batch)


@numba.njit(nogil=True, cache=True)
def run_attention(job, out):
    """Compute heads START to STOP for all tokens of a block; each token attends to itself and earlier ones.

    One head after another, so that its keys and values stay in the cache from token to token.
    """
    heads, size, capacity = job[HEADS], job[HEAD_DIM], job[CAPACITY]
    scores = aligned_empty(job[POSITION] + job[SEGMENTS] + 2 * LANES)
    for head in range(job[START], job[STOP]):
        place = 4 * size * capacity * (head // (heads // job[KV_HEADS]))
        for token in range(job[SEGMENTS]):
            at, length = 4 * size * (token * heads + head), job[POSITION] + token + 1
            attend(job[X] + at, job[KEYS] + place, job[VALUES] + place, length, size, scores, out + at)


def run_job(mailbox, out):
    """Do the job in the mailbox at an address: write items START to STOP of the result at the address `out`.

    Compiled once and called by its address. Called by its name, Numba would optimise all of it again in every caller.
    """
    job = numba.carray(pointer(mailbox), (MAILBOX,), np.int64)
    if job[KIND] == HEAD:
        head_rows(job[TABLE:], job[X], job[SIZE], floats_at(out, job[STOP]), job[START], job[STOP])
    elif job[KIND] == ATTENTION:
        run_attention(job, out)
    elif job[BATCH] == BATCH_TILE:
        run_layer(job, out, (0, 0, 0, 0))
    else:
        run_layer(job, out, (0,))


@functools.cache
def run_job_address() -> int:
    """Compile `run_job` on first use, and return its address."""
    return numba.cfunc("void(int64, int64)", nopython=True, cache=True)(run_job).address


# A helper's side


@numba.njit(nogil=True, cache=True)
def spin(mailbox, patience):
    """Do the jobs that are posted to a mailbox until none has come for `patience` pauses; return whether to sleep."""
    state, idle = address_of(mailbox), 0
    while idle < patience:
        now = atomic_load(state)
        if now == POSTED and compare_and_swap(state, POSTED, RUNNING):
            call_address(mailbox[RUN], state, mailbox[OUT])
            if not compare_and_swap(state, RUNNING, DONE):  # the caller reclaimed it
                atomic_store(state, READY)
            idle = 0
        elif now == RECLAIMED:
            atomic_store(state, READY)
        else:
            pause()
            idle += 1
    return compare_and_swap(state, READY, ASLEEP)


@numba.njit(nogil=True, cache=True)
def helper_loop(mailbox, patience):
    """Sleep until woken, spin for jobs, and sleep again, until the mailbox says CLOSED."""
    state, byte = address_of(mailbox), np.zeros(1, np.uint8)
    while not atomic_load(state + 8 * CLOSED):
        read(mailbox[PIPE_READ], address_of(byte), 1)
        if compare_and_swap(state, WOKEN, READY):
            while not spin(mailbox, patience):  # a share is done, but the caller has not collected it yet
                pass


# The caller's side


@numba.njit(nogil=True, cache=True)
def wake(team, at):
    """Wake the helper whose mailbox begins at team[at] if it is asleep."""
    if compare_and_swap(address_of(team) + 8 * at, ASLEEP, WOKEN):
        write(team[at + PIPE_WRITE], address_of(team), 1)


@numba.njit(nogil=True, cache=True)
def post(team, at, start, stop):
    """Give items of the caller's job to the helper at team[at]; return False if it has fallen asleep."""
    for field in range(KIND, JOB_END):
        team[at + field] = team[field]
    team[at + START], team[at + STOP] = start, stop
    return compare_and_swap(address_of(team) + 8 * at, READY, POSTED)


@numba.njit(nogil=True, cache=True)
def collect(team, at, result):
    """Copy the share of the helper at team[at] to the result, or compute it here if it has not begun or is late."""
    state, waited = address_of(team) + 8 * at, 0
    while True:
        now = atomic_load(state)
        if now == DONE:
            break
        if (now == POSTED or waited > team[LATE] * team[GRAINS]) and compare_and_swap(state, now, RECLAIMED):
            call_address(team[RUN], state, result)
            team[CREDIT] -= LATE_COST
            if team[CREDIT] < 0:
                team[CREDIT], team[ALONE] = 0, ALONE_JOBS
            return
        pause()
        waited += 1
    unit, stride = team[at + UNIT], team[at + STRIDE]
    first, size = unit * team[at + START], unit * (team[at + STOP] - team[at + START])
    for b in range(team[at + SEGMENTS]):
        place = 4 * (b * stride + first)
        source, target = floats_at(team[at + OUT] + place, size), floats_at(result + place, size)
        for j in range(size):
            target[j] = source[j]
    atomic_store(state, READY)
    team[CREDIT] = min(team[CREDIT] + 1, MAX_CREDIT)


@numba.njit(nogil=True, cache=True)
def run_here(team, result, start, stop):
    """Compute items of the caller's job on the caller's thread."""
    if start < stop:
        team[START], team[STOP] = start, stop
        call_address(team[RUN], address_of(team), result)


@numba.njit(nogil=True, cache=True)
def divide(team, result, items):
    """Do the job in the caller's mailbox: divide its items among the caller and the helpers that are ready.

    team : flat int64; result : address; items : their number. Shares begin at multiples of the caller's MULTIPLE. If
    the items exceed GRAIN for each thread, they are handed out in several rounds.
    """
    if team[ALONE] > 0:
        team[ALONE] -= max(1, (items + team[GRAIN] - 1) // team[GRAIN] * team[GRAINS])
        run_here(team, result, 0, items)
        return
    place, start = address_of(team), np.int64(0)
    while start < items:
        shares = np.int64(1)
        for at in range(MAILBOX, len(team), MAILBOX):
            shares += atomic_load(place + 8 * at) == READY
            wake(team, at)
        size = min(items - start, team[GRAIN] * shares)
        blocks = (size + team[MULTIPLE] - 1) // team[MULTIPLE]
        given = np.int64(1)  # the first share is the caller's
        for at in range(MAILBOX, len(team), MAILBOX):
            team[at + HAS_SHARE] = 0
            begin = min(size, blocks * given // shares * team[MULTIPLE])
            end = min(size, blocks * (given + 1) // shares * team[MULTIPLE])
            if given < shares and begin < end and atomic_load(place + 8 * at) == READY:
                team[at + HAS_SHARE] = post(team, at, start + begin, start + end)
                given += team[at + HAS_SHARE]
        run_here(team, result, start, start + min(size, blocks // shares * team[MULTIPLE]))
        unassigned = start + min(size, blocks * given // shares * team[MULTIPLE])  # helpers fell asleep meanwhile
        run_here(team, result, unassigned, start + size)
        for at in range(MAILBOX, len(team), MAILBOX):
            if team[at + HAS_SHARE]:
                collect(team, at, result)
        start += size


# Jobs: a packed layer, a dense head, attention


@numba.njit(nogil=True, cache=True)
def divided_stages(team, total, y):
    """Compute `cpu.layer_rows`, each stage divided by rows of signs; `total` ranks of all paths, padded."""
    team[T], team[UNIT], team[SEGMENTS], team[MULTIPLE] = team[SCRATCH], 1, team[BATCH], LANES
    threads = len(team) // MAILBOX
    team[KIND], team[STRIDE], team[GRAIN] = FIRST, total, total
    team[GRAINS] = max(1, team[BATCH] * total * team[D_IN] // (threads * GRAIN_WORK))
    divide(team, team[SCRATCH], total)
    team[KIND], team[STRIDE], team[GRAIN] = SECOND, team[D_OUT], team[D_OUT]
    team[GRAINS] = max(1, team[BATCH] * total * team[D_OUT] // (threads * GRAIN_WORK))
    divide(team, y, team[D_OUT])


@numba.njit(nogil=True, cache=True)
def divided_layer(team, kernel, paths, d_out, d_in, x, y, rows):
    """Compute y = W_hat x for each row of x, on all threads of a team if there is enough work; x and y are addresses.

    Threads first divide the rows of x, in groups of BATCH_TILE that share lookups, then single rows. If a group that is
    left over has enough work by itself, they divide its rows of signs.

    paths : (paths, PATH_FIELDS) int64.
    """
    work, total, threads = np.int64(0), path_offsets(paths)[-1], len(team) // MAILBOX
    for order in range(len(paths)):
        work += paths[order, RANK] * (d_out + d_in)
    team[KERNEL], team[PATHS], team[PATH_COUNT] = kernel, address_of(paths.ravel()), len(paths)
    team[D_OUT], team[D_IN] = d_out, d_in
    b = np.int64(0)
    for batch in (BATCH_TILE, 1):
        groups = (rows - b) // batch
        team[BATCH], team[X] = batch, x + 4 * b * d_in
        whole = groups if threads == 1 or batch * work < team[MIN_WORK] else groups // threads * threads
        team[KIND], team[UNIT], team[SEGMENTS], team[STRIDE] = ROWS, batch * d_out, 1, whole * batch * d_out
        team[MULTIPLE], team[GRAIN] = 1, max(1, GRAIN_WORK // (batch * work))
        team[GRAINS] = max(1, batch * work // GRAIN_WORK)
        if threads == 1 or whole * batch * work < team[MIN_WORK]:
            run_here(team, y + 4 * b * d_out, 0, whole)
        else:
            divide(team, y + 4 * b * d_out, whole)
        b += whole * batch
        for _ in range(whole, groups):
            team[X] = x + 4 * b * d_in
            divided_stages(team, total, y + 4 * b * d_out)
            b += batch


@numba.njit(nogil=True, cache=True)
def divided_head(team, table, x, size, logits, rows):
    """Compute `cpu_dense.head_rows` for all rows, divided among the threads of a team; x and logits are addresses."""
    for at in range(len(table)):
        team[TABLE + at] = table[at]
    team[KIND], team[X], team[SIZE], team[UNIT], team[SEGMENTS], team[STRIDE] = HEAD, x, size, 1, 1, rows
    team[GRAINS] = 1
    team[MULTIPLE], team[GRAIN] = 4, max(4, 2 * GRAIN_WORK // (SIGNS_PER_PRODUCT * size))  # rows share loads by four
    if len(team) == MAILBOX or SIGNS_PER_PRODUCT * rows * size < team[MIN_WORK]:
        run_here(team, logits, 0, rows)
    else:
        divide(team, logits, rows)


@numba.njit(nogil=True, cache=True)
def divided_attention(team, q, keys, values, position, count, heads, out):
    """Compute attention of all heads of a block of tokens, divided among the threads of a team.

    q, out : flat, (count, heads, head_dim); keys, values : (kv_heads, capacity, head_dim), filled up to the last token.
    """
    kv_heads, capacity, size = keys.shape
    work = 2 * SIGNS_PER_PRODUCT * size * (position + count) * count  # of one head, at most
    team[KIND], team[X], team[UNIT], team[SEGMENTS], team[STRIDE] = ATTENTION, address_of(q), size, count, heads * size
    team[KEYS], team[VALUES], team[POSITION] = address_of(keys.ravel()), address_of(values.ravel()), position
    team[HEADS], team[KV_HEADS], team[HEAD_DIM], team[CAPACITY] = heads, kv_heads, size, capacity
    team[MULTIPLE], team[GRAIN], team[GRAINS] = 1, max(1, GRAIN_WORK // work), max(1, work // GRAIN_WORK)
    if len(team) == MAILBOX or heads * work < team[MIN_WORK]:
        run_here(team, address_of(out), 0, heads)
    else:
        divide(team, address_of(out), heads)


# The threads themselves


def default_threads() -> int:
    """Choose the number of threads: torch's if torch is imported, else OMP_NUM_THREADS, else all; at most Numba's."""
    torch = sys.modules.get("torch")
    if torch:
        return min(torch.get_num_threads(), MAX_THREADS)
    requested = os.environ.get("OMP_NUM_THREADS", "")
    return min(int(requested), MAX_THREADS) if requested.isdecimal() and int(requested) else MAX_THREADS


def aligned_zeros(size: int, dtype: Any) -> Array:
    """Allocate an array of zeros that begins on a cache line."""
    itemsize = np.dtype(dtype).itemsize
    space = np.zeros(size + 64 // itemsize, dtype)
    skip = (-space.ctypes.data & 63) // itemsize
    return space[skip : skip + size]


def solo_team() -> Array:
    """Make a team of the calling thread alone."""
    team = np.zeros(MAILBOX, np.int64)
    team[RUN] = run_job_address()
    return team


class Helper(threading.Thread):
    """A thread that does the jobs in its mailbox.

    Parameters
    ----------
    mailbox : (MAILBOX,) int64 array
    patience : int
        Pauses without a job after which it sleeps.

    Attributes
    ----------
    kept : list
        References to what its job reads and writes, kept for as long as it may be late with one.
    """

    def __init__(self, mailbox: Array, patience: int):
        super().__init__(name="littlebit-helper", daemon=True)
        self.mailbox, self.patience, self.kept = mailbox, patience, []
        self.out = aligned_zeros(0, np.float32)
        self.pipe = os.pipe()
        mailbox[STATE], mailbox[CLOSED], mailbox[RUN] = ASLEEP, 0, run_job_address()
        mailbox[PIPE_READ], mailbox[PIPE_WRITE] = self.pipe

    def run(self) -> None:
        """Do jobs until closed, at a low priority where the system has a priority for each thread."""
        if sys.platform == "linux":
            thread = threading.get_native_id()
            with contextlib.suppress(OSError):  # some systems forbid it
                os.setpriority(os.PRIO_PROCESS, thread, min(os.getpriority(os.PRIO_PROCESS, thread) + NICE, 19))
        helper_loop(self.mailbox, self.patience)

    def close(self) -> None:
        """End the thread, and close its pipe."""
        self.mailbox[CLOSED] = 1
        os.write(self.pipe[1], b"x")
        self.join()
        self.close_pipe()

    def close_pipe(self) -> None:
        """Close both ends of the pipe."""
        for end in self.pipe:
            os.close(end)

    def is_late(self) -> bool:
        """Return whether it may still be at work on a share that was reclaimed."""
        return self.mailbox[STATE] == RECLAIMED

    def reserve(self, floats: int) -> None:
        """Give it memory for that many float32 results."""
        if len(self.out) < floats:
            self.out = aligned_zeros(floats, np.float32)
            self.mailbox[OUT] = self.out.ctypes.data


class Pool:
    """The helpers of this process. One Python thread at a time uses them; meanwhile the others use one thread."""

    def __init__(self) -> None:
        self.busy = threading.Lock()
        self.team = aligned_zeros(MAX_THREADS * MAILBOX, np.int64)
        self.scratch = aligned_zeros(0, np.float32)
        self.helpers: list[Helper] = []
        self.pauses_per_s = 0.0

    def start(self, count: int) -> int:
        """Start helpers until there are `count`, or as many as the system allows; return how many there are."""
        if not self.pauses_per_s:
            self.pauses_per_s = pauses_per_second()
            self.team[LATE] = int(LATE_S * self.pauses_per_s)
            self.team[RUN] = run_job_address()
        while len(self.helpers) < count:
            at = MAILBOX * (len(self.helpers) + 1)
            try:
                helper = Helper(self.team[at : at + MAILBOX], int(IDLE_S * self.pauses_per_s))
            except OSError:  # too many open files
                break
            try:
                helper.start()
            except RuntimeError:  # too many threads
                helper.close_pipe()
                break
            self.helpers.append(helper)
        return min(count, len(self.helpers))

    def reserve(self, count: int, floats: int) -> None:
        """Allocate `floats` float32 for the caller and `count` helpers each, after late helpers have finished."""
        helpers = self.helpers[:count]
        if len(self.scratch) >= floats and all(len(helper.out) >= floats for helper in helpers):
            return
        while any(helper.is_late() for helper in self.helpers):
            time.sleep(LATE_S)
        if len(self.scratch) < floats:
            self.scratch = aligned_zeros(floats, np.float32)
            self.team[SCRATCH] = self.scratch.ctypes.data
        for helper in helpers:
            helper.reserve(floats)

    def close(self) -> None:
        """End all helpers."""
        while self.helpers:
            self.helpers.pop().close()


def pauses_per_second() -> float:
    """Measure how often a helper that spins looks for a job in a second: the best of five tries."""
    mailbox, count, best = np.zeros(MAILBOX, np.int64), 2000, 0.0
    for _ in range(5):
        mailbox[STATE] = READY
        start = time.perf_counter()
        spin(mailbox, count)
        best = max(best, count / (time.perf_counter() - start))
    return best


pool = Pool()


def close_pool() -> None:
    """End the helpers of this process before the memory that they poll is freed."""
    pool.close()


def after_fork() -> None:
    """Give a forked child its own pool, whose helpers start when they are needed.

    A child has none of its parent's threads. It has none of OpenMP's either, so torch must use one thread there: it
    would wait forever for the others.
    """
    global pool
    started, pool = pool.helpers, Pool()
    for helper in started:
        helper.close_pipe()
    if started and (torch := sys.modules.get("torch")):
        torch.set_num_threads(1)  # torch does the same in a DataLoader's workers


atexit.register(close_pool)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=after_fork)


class Team:
    """Threads for the kernels in a `with` block: all by default, or one if another Python thread uses the helpers.

    Entering returns the array that the kernels take as `team`. (It is a class because entering a generator-based
    context manager takes as long as computing a small layer.)

    Parameters
    ----------
    wanted : int, optional
        Threads to use at most.
    floats : int
        Size of the largest result or intermediate that is divided, in float32.
    kept : object
        Holds references to all memory that the kernels use in the block. It is kept until no helper is late with it.
    """

    def __init__(self, wanted: int | None = None, floats: int = 0, kept: Any = None):
        self.count = default_threads() if wanted is None else min(wanted, MAX_THREADS)
        self.floats, self.kept, self.pool = floats, kept, pool

    def __enter__(self) -> Array:
        """Reserve the helpers; return a mailbox for each thread, as one flat int64 array."""
        helpers = self.pool
        if self.count < 2 or not helpers.busy.acquire(blocking=False):
            self.count = 1
            return solo_team()
        try:
            self.mine = helpers.helpers[: helpers.start(self.count - 1)]
            helpers.reserve(len(self.mine), self.floats)
        except BaseException:
            helpers.busy.release()
            raise
        helpers.team[MIN_WORK] = PARALLEL_WORK
        for helper in self.mine:
            helper.kept.append(self.kept)
        return helpers.team[: MAILBOX * (1 + len(self.mine))]

    def __exit__(self, *error: object) -> None:
        """Release the helpers."""
        if self.count > 1:
            for helper in self.mine:
                if not helper.is_late():
                    helper.kept.clear()
            self.pool.busy.release()
