"""Divide work among threads: results equal one thread's bit for bit, even if a helper is late or never runs."""

import os
import threading
import time

import numba
import numpy as np
import pytest
import torch
from compare import assert_same
from hypothesis import HealthCheck, given, settings, strategies as st
from littlebit.fast.bench.decode import bench_load
from littlebit.fast.bench.linear import random_path
from littlebit.fast.kernels import cpu, cpu_threads as threads
from littlebit.fast.kernels.cpu_layer import CpuPackedLayer
from littlebit.fast.kernels.cpu_simd import atomic_store

WAIT_S = 20
MARK = np.float32(7)


def layer_of(d_out=90, d_in=70, rank=40, paths=2):
    generator = torch.Generator().manual_seed(d_out + rank)
    return CpuPackedLayer([each for _ in range(paths) for each in random_path(d_out, d_in, rank, generator)])


def outputs(layer, team, rows):
    x = torch.randn(rows, layer.d_in, generator=torch.Generator().manual_seed(rows))
    y = torch.full((rows, layer.d_out), float("nan"))
    threads.divided_layer(team, cpu.BEST, layer.table, layer.d_out, layer.d_in, x.data_ptr(), y.data_ptr(), rows)
    return y


class FakeTeam:
    """A team whose helpers are mailboxes without a thread."""

    def __init__(self, helpers, floats=1 << 14, state=threads.READY):
        self.team = threads.aligned_zeros((1 + helpers) * threads.MAILBOX, np.int64)
        self.spaces = [np.full(floats, MARK, np.float32) for _ in range(1 + helpers)]
        self.mailboxes = self.team.reshape(-1, threads.MAILBOX)
        self.mailboxes[:, threads.RUN] = threads.run_job_address()
        self.mailboxes[0, threads.SCRATCH] = self.spaces[0].ctypes.data
        for mailbox, space in zip(self.mailboxes[1:], self.spaces[1:], strict=True):
            mailbox[threads.STATE], mailbox[threads.OUT] = state, space.ctypes.data

    def post_copy(self):
        """Post rows 4 to 7 of a head of ones (8 rows of 16 entries) to the first helper; return the whole result."""
        self.weights, self.x = np.ones((8, 16), np.float32), np.arange(16, dtype=np.float32)
        self.logits = np.zeros(8, np.float32)
        table = np.array([32, self.weights.ctypes.data, 0, 0, 0])
        threads.divided_head(self.mailboxes[0], table, self.x.ctypes.data, 16, self.logits.ctypes.data, 8)
        expected = self.logits.copy()
        self.logits[4:] = 0
        assert threads.post(self.team, threads.MAILBOX, 4, 8)
        return expected


@pytest.fixture
def many(monkeypatch):
    """Allow up to five threads on any machine, and for small layers too."""
    monkeypatch.setattr(threads, "MAX_THREADS", 5)
    monkeypatch.setattr(threads, "PARALLEL_WORK", 0)
    monkeypatch.setattr(threads, "pool", threads.Pool())
    yield
    threads.close_pool()


@given(wanted=st.integers(1, 5), rows=st.integers(1, 23), paths=st.integers(1, 3), rank=st.integers(1, 100))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_layer_is_the_same_on_any_number_of_threads(many, wanted, rows, paths, rank):
    layer = layer_of(rank=rank, paths=paths)
    with threads.Team(wanted, layer.scratch_floats(rows), layer) as team:
        assert len(team) == wanted * threads.MAILBOX
        found = outputs(layer, team, rows)
    assert_same(found, outputs(layer, threads.solo_team(), rows))


def test_shares_of_helpers_that_do_not_run_are_reclaimed():
    layer, fake = layer_of(), FakeTeam(2)
    expected = outputs(layer, threads.solo_team(), 5)
    for _ in range(2):  # in the second round no helper is READY
        assert_same(outputs(layer, fake.team, 5), expected)
        assert fake.mailboxes[1:, threads.STATE].tolist() == [threads.RECLAIMED] * 2


def test_a_helper_that_sleeps_is_woken_once_and_not_waited_for():
    layer, fake = layer_of(), FakeTeam(1, state=threads.ASLEEP)
    read, write = os.pipe()
    fake.mailboxes[1, threads.PIPE_WRITE] = write
    assert_same(outputs(layer, fake.team, 1), outputs(layer, threads.solo_team(), 1))
    assert fake.mailboxes[1, threads.STATE] == threads.WOKEN
    assert len(os.read(read, 9)) == 1
    os.close(read)
    os.close(write)


def test_a_late_share_is_computed_by_the_caller():
    fake = FakeTeam(1)
    expected = fake.post_copy()
    fake.mailboxes[1, threads.STATE] = threads.RUNNING
    threads.collect(fake.team, threads.MAILBOX, fake.logits.ctypes.data)
    assert_same(fake.logits, expected)
    assert fake.mailboxes[1, threads.STATE] == threads.RECLAIMED
    assert (fake.spaces[1] == MARK).all()


@pytest.mark.parametrize(("credit", "alone"), [(threads.LATE_COST, False), (0, True)])
def test_the_caller_works_alone_after_late_shares_that_few_punctual_ones_make_up_for(credit, alone):
    layer, fake = layer_of(), FakeTeam(1)
    expected, caller = outputs(layer, threads.solo_team(), 1), fake.mailboxes[0]
    caller[threads.CREDIT] = credit
    assert_same(outputs(layer, fake.team, 1), expected)
    assert (caller[threads.ALONE] > 0) == alone
    fake.mailboxes[1, threads.STATE] = threads.READY
    assert_same(outputs(layer, fake.team, 1), expected)
    assert (fake.mailboxes[1, threads.STATE] == threads.READY) == alone


def test_a_punctual_share_makes_up_for_late_ones():
    fake = FakeTeam(1)
    fake.post_copy()
    threads.spin(fake.mailboxes[1], 1)
    threads.collect(fake.team, threads.MAILBOX, fake.logits.ctypes.data)
    assert fake.mailboxes[0, threads.CREDIT] == 1


def test_only_the_share_is_copied_when_it_is_done():
    fake = FakeTeam(1)
    expected = fake.post_copy()
    assert not threads.spin(fake.mailboxes[1], 1)  # it must not sleep before its share is collected
    assert fake.mailboxes[1, threads.STATE] == threads.DONE
    assert_same(fake.spaces[1][4:8], expected[4:])
    fake.spaces[1][:4] = np.nan
    threads.collect(fake.team, threads.MAILBOX, fake.logits.ctypes.data)
    assert_same(fake.logits, expected)
    assert fake.mailboxes[1, threads.STATE] == threads.READY


def test_a_helper_whose_share_was_reclaimed_is_ready_again():
    fake = FakeTeam(1)
    fake.post_copy()

    @numba.cfunc("void(int64, int64)")
    def reclaimed_meanwhile(mailbox, out):
        atomic_store(mailbox, threads.RECLAIMED)

    fake.mailboxes[1, threads.RUN] = reclaimed_meanwhile.address
    assert threads.spin(fake.mailboxes[1], 1)
    assert fake.mailboxes[1, threads.STATE] == threads.ASLEEP


def test_segments_of_a_share_are_copied_to_their_places():
    """Copy a share of three rows and two floats for each item, the layout of a batched first stage and of attention."""
    fake = FakeTeam(1)
    result = np.zeros((3, 20), np.float32)
    mailbox = fake.mailboxes[1]
    mailbox[[threads.UNIT, threads.SEGMENTS, threads.STRIDE, threads.START, threads.STOP]] = 2, 3, 20, 4, 7
    mailbox[threads.STATE] = threads.DONE
    threads.collect(fake.team, threads.MAILBOX, result.ctypes.data)
    expected = np.zeros((3, 20), np.float32)
    expected[:, 8:14] = MARK
    assert_same(result, expected)


def wait_until(condition):
    stop = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < stop
        time.sleep(0.001)


def test_helpers_sleep_when_there_is_nothing_to_do_and_end_with_their_pool(many):
    layer = layer_of()
    with threads.Team(3, layer.scratch_floats(1), layer) as team:
        outputs(layer, team, 1)
    helpers = list(threads.pool.helpers)
    assert len(helpers) == 2
    wait_until(lambda: all(helper.mailbox[threads.STATE] == threads.ASLEEP for helper in helpers))
    threads.close_pool()
    assert not any(helper.is_alive() for helper in helpers)


def test_memory_that_a_late_helper_reads_is_kept_until_it_finishes(many):
    layer, other = layer_of(), object()
    with threads.Team(2, layer.scratch_floats(1), layer):
        (helper,) = threads.pool.helpers
        assert helper.kept == [layer]
    assert helper.kept == []
    with threads.Team(2, layer.scratch_floats(1), layer):
        wait_until(lambda: helper.mailbox[threads.STATE] == threads.ASLEEP)
        helper.mailbox[threads.STATE] = threads.RECLAIMED
    with threads.Team(2, layer.scratch_floats(1), other):
        assert helper.kept == [layer, other]
    assert helper.kept == [layer, other]
    timer = threading.Timer(0.05, lambda: helper.mailbox.__setitem__(threads.STATE, threads.ASLEEP))
    timer.start()
    with threads.Team(2, layer.scratch_floats(1) + 1, layer):  # its memory is replaced only after it has finished
        assert helper.mailbox[threads.STATE] == threads.ASLEEP
    assert helper.kept == []


def test_one_python_thread_uses_the_helpers_and_others_work_alone(many):
    with threads.Team(2) as first, threads.Team(2) as second:
        assert (len(first), len(second)) == (2 * threads.MAILBOX, threads.MAILBOX)
    with threads.Team(2) as again:
        assert len(again) == 2 * threads.MAILBOX


@pytest.mark.parametrize(
    ("what", "error"), [("start", RuntimeError("can't start new thread")), ("pipe", OSError(24, "x"))]
)
def test_fewer_threads_are_used_where_no_more_can_start(many, monkeypatch, what, error):
    def refuse(*_):
        raise error

    with threads.Team(2):
        pass
    monkeypatch.setattr(*((threads.Helper, "start") if what == "start" else (os, "pipe")), refuse)
    with threads.Team(4) as team:
        assert len(team) == 2 * threads.MAILBOX


def test_bench_load_measures_quiet_and_busy(tiny_llama):
    rows = bench_load(tiny_llama, (1, 2), tokens=2, rounds=2, progress=False)
    assert [(row["load"], row["threads"]) for row in rows] == [("quiet", 1), ("quiet", 2), ("busy", 1), ("busy", 2)]
    assert [row["times_one_thread"] == 1 for row in rows] == [True, False, True, False]
    assert all(row["tokens_per_s"] > 0 and row["core_share"] > 0 for row in rows)
