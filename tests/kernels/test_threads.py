"""Threads that share work: whoever is late or absent, the results are those of one thread, to the bit."""

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
from littlebit.fast.kernels.cpu_layer import Plan
from littlebit.fast.kernels.cpu_simd import atomic_store

WAIT_S = 20
MARK = np.float32(7)


def plan_of(d_out=90, d_in=70, rank=40, paths=2):
    generator = torch.Generator().manual_seed(d_out + rank)
    return Plan([each for _ in range(paths) for each in random_path(d_out, d_in, rank, generator)])


def outputs(plan, team, rows):
    x = torch.randn(rows, plan.d_in, generator=torch.Generator().manual_seed(rows))
    y = torch.full((rows, plan.d_out), float("nan"))
    threads.layer(team, cpu.BEST, plan.numbers, plan.d_out, plan.d_in, x.data_ptr(), y.data_ptr(), rows)
    return y


class FakeTeam:
    """A team whose helpers are numbers alone: no thread stands behind them."""

    def __init__(self, helpers, floats=1 << 14, state=threads.READY):
        self.team = threads.aligned_zeros((1 + helpers) * threads.WIDTH, np.int64)
        self.spaces = [np.full(floats, MARK, np.float32) for _ in range(1 + helpers)]
        self.rows = self.team.reshape(-1, threads.WIDTH)
        self.rows[:, threads.RUN] = threads.run_address()
        self.rows[0, threads.SPACE] = self.spaces[0].ctypes.data
        for row, space in zip(self.rows[1:], self.spaces[1:], strict=True):
            row[threads.STATE], row[threads.OUT] = state, space.ctypes.data

    def post_copy(self):
        """Post the second half of a head of ones, 8 rows of 16 entries, to the first helper; its whole result."""
        self.weights, self.x = np.ones((8, 16), np.float32), np.arange(16, dtype=np.float32)
        self.logits = np.zeros(8, np.float32)
        table = np.array([32, self.weights.ctypes.data, 0, 0, 0])
        threads.divided_head(self.rows[0], table, self.x.ctypes.data, 16, self.logits.ctypes.data, 8)
        expected = self.logits.copy()
        self.logits[4:] = 0
        assert threads.post(self.team, threads.WIDTH, 4, 8)
        return expected


@pytest.fixture
def many(monkeypatch):
    """Up to five threads on any machine, also for small layers."""
    monkeypatch.setattr(threads, "MAX_THREADS", 5)
    monkeypatch.setattr(threads, "PARALLEL_WORK", 0)
    monkeypatch.setattr(threads, "pool", threads.Pool())
    yield
    threads.close_pool()


@given(wanted=st.integers(1, 5), rows=st.integers(1, 23), paths=st.integers(1, 3), rank=st.integers(1, 100))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_layer_is_the_same_on_any_number_of_threads(many, wanted, rows, paths, rank):
    plan = plan_of(rank=rank, paths=paths)
    with threads.Team(wanted, plan.floats(rows), plan) as team:
        assert len(team) == wanted * threads.WIDTH
        found = outputs(plan, team, rows)
    assert_same(found, outputs(plan, threads.row_alone(), rows))


def test_parts_of_helpers_that_do_not_run_are_taken_back():
    plan, fake = plan_of(), FakeTeam(2)
    expected = outputs(plan, threads.row_alone(), 5)
    for _ in range(2):  # then nobody is ready any more
        assert_same(outputs(plan, fake.team, 5), expected)
        assert fake.rows[1:, threads.STATE].tolist() == [threads.TAKEN] * 2


def test_a_helper_that_sleeps_is_woken_once_and_not_waited_for():
    plan, fake = plan_of(), FakeTeam(1, state=threads.ASLEEP)
    read, write = os.pipe()
    fake.rows[1, threads.WRITE] = write
    assert_same(outputs(plan, fake.team, 1), outputs(plan, threads.row_alone(), 1))
    assert fake.rows[1, threads.STATE] == threads.WOKEN
    assert len(os.read(read, 9)) == 1
    os.close(read)
    os.close(write)


def test_a_part_that_is_late_is_done_by_the_caller():
    fake = FakeTeam(1)
    expected = fake.post_copy()
    fake.rows[1, threads.STATE] = threads.RUNNING
    threads.collect(fake.team, threads.WIDTH, fake.logits.ctypes.data)
    assert_same(fake.logits, expected)
    assert fake.rows[1, threads.STATE] == threads.TAKEN
    assert (fake.spaces[1] == MARK).all()


def test_a_part_that_is_done_is_copied_and_nothing_else():
    fake = FakeTeam(1)
    expected = fake.post_copy()
    assert not threads.serve(fake.rows[1], 1)  # it may not sleep before its part is collected
    assert fake.rows[1, threads.STATE] == threads.DONE
    assert_same(fake.spaces[1][4:8], expected[4:])
    fake.spaces[1][:4] = np.nan
    threads.collect(fake.team, threads.WIDTH, fake.logits.ctypes.data)
    assert_same(fake.logits, expected)
    assert fake.rows[1, threads.STATE] == threads.READY


def test_a_helper_whose_part_was_taken_back_is_ready_again():
    fake = FakeTeam(1)
    fake.post_copy()

    @numba.cfunc("void(int64, int64)")
    def taken_meanwhile(row, out):
        atomic_store(row, threads.TAKEN)

    fake.rows[1, threads.RUN] = taken_meanwhile.address
    assert threads.serve(fake.rows[1], 1)
    assert fake.rows[1, threads.STATE] == threads.ASLEEP


def test_rows_of_a_result_are_copied_to_their_places():
    """Several rows, some floats an item: what a first stage of four rows, and attention, leave."""
    fake = FakeTeam(1)
    result = np.zeros((3, 20), np.float32)
    row = fake.rows[1]
    row[[threads.UNIT, threads.SEGMENTS, threads.STRIDE, threads.START, threads.STOP]] = 2, 3, 20, 4, 7
    row[threads.STATE] = threads.DONE
    threads.collect(fake.team, threads.WIDTH, result.ctypes.data)
    expected = np.zeros((3, 20), np.float32)
    expected[:, 8:14] = MARK
    assert_same(result, expected)


def wait_until(condition):
    stop = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < stop
        time.sleep(0.001)


def test_helpers_sleep_when_there_is_nothing_to_do_and_end_with_their_pool(many):
    plan = plan_of()
    with threads.Team(3, plan.floats(1), plan) as team:
        outputs(plan, team, 1)
    helpers = list(threads.pool.helpers)
    assert len(helpers) == 2
    wait_until(lambda: all(helper.row[threads.STATE] == threads.ASLEEP for helper in helpers))
    threads.close_pool()
    assert not any(helper.is_alive() for helper in helpers)


def test_what_a_late_helper_reads_is_kept_until_it_is_not_late(many):
    plan, other = plan_of(), object()
    with threads.Team(2, plan.floats(1), plan):
        (helper,) = threads.pool.helpers
        assert helper.kept == [plan]
    assert helper.kept == []
    with threads.Team(2, plan.floats(1), plan):
        wait_until(lambda: helper.row[threads.STATE] == threads.ASLEEP)
        helper.row[threads.STATE] = threads.TAKEN
    with threads.Team(2, plan.floats(1), other):
        assert helper.kept == [plan, other]
    assert helper.kept == [plan, other]
    timer = threading.Timer(0.05, lambda: helper.row.__setitem__(threads.STATE, threads.ASLEEP))
    timer.start()
    with threads.Team(2, plan.floats(1) + 1, plan):  # its space is not changed under it
        assert helper.row[threads.STATE] == threads.ASLEEP
    assert helper.kept == []


def test_one_python_thread_has_the_helpers_and_the_others_work_alone(many):
    with threads.Team(2) as first, threads.Team(2) as second:
        assert (len(first), len(second)) == (2 * threads.WIDTH, threads.WIDTH)
    with threads.Team(2) as again:
        assert len(again) == 2 * threads.WIDTH


@pytest.mark.parametrize(
    ("what", "error"), [("start", RuntimeError("can't start new thread")), ("pipe", OSError(24, "x"))]
)
def test_fewer_threads_do_where_no_more_can_be_started(many, monkeypatch, what, error):
    def refuse(*_):
        raise error

    with threads.Team(2):
        pass
    monkeypatch.setattr(*((threads.Helper, "start") if what == "start" else (os, "pipe")), refuse)
    with threads.Team(4) as team:
        assert len(team) == 2 * threads.WIDTH


def test_bench_load_measures_quiet_and_busy(tiny_llama):
    rows = bench_load(tiny_llama, (1, 2), tokens=2, rounds=2, progress=False)
    assert [(row["load"], row["threads"]) for row in rows] == [("quiet", 1), ("quiet", 2), ("busy", 1), ("busy", 2)]
    assert [row["times_one_thread"] == 1 for row in rows] == [True, False, True, False]
    assert all(row["tokens_per_s"] > 0 and row["core_share"] > 0 for row in rows)
