"""Test the recording of a step with stand-ins for CUDA graphs, and that torch's settings are restored."""

import contextlib

import pytest
import torch
from compare import assert_same
from littlebit.fast.training import execution


@pytest.fixture
def events(monkeypatch):
    """Replace CUDA graphs and streams by stand-ins, and return the list of what happens to them."""
    events = []

    class Graph:
        def __init__(self):
            self.name = f"graph {sum(each.startswith('new') for each in events)}"
            events.append(f"new {self.name}")

        def replay(self):
            events.append(f"replay {self.name}")

    class Stream:
        def wait_stream(self, other):
            events.append("wait")

    @contextlib.contextmanager
    def graph(made, pool):
        assert pool == (0, 1)
        events.append(f"begin {made.name}")
        yield
        events.append(f"end {made.name}")

    stand_ins = {"CUDAGraph": Graph, "Stream": Stream, "graph": graph, "graph_pool_handle": lambda: (0, 1)}
    stand_ins |= {"current_stream": Stream, "stream": lambda stream: contextlib.nullcontext()}
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return events


@pytest.mark.parametrize("processes", [1, 2])
def test_record_step_captures_around_what_runs_eagerly(events, processes):
    """It warms up eagerly, captures without gradients, and restores the state; each replay runs all parts in order."""
    parameter, outputs = torch.ones(3), (torch.zeros(()), torch.zeros(()))
    eager = []

    def step(recorder):
        if recorder is not None:
            assert parameter.grad is None
            if processes > 1:
                recorder.run_eagerly(lambda: events.append("all-reduce"))
        else:
            eager.append(parameter.clone())
        parameter.grad = torch.ones(3)
        parameter.data += 1
        return outputs

    replay = execution.record_step(step, [parameter], {"parameter": parameter.data})
    assert len(eager) == execution.EAGER_STEPS
    assert_same(parameter.data, torch.ones(3))
    recorded = events[2:]
    if processes == 1:
        assert recorded == ["new graph 0", "begin graph 0", "end graph 0"]
    else:
        graphs = [f"{what} graph {at}" for at in range(2) for what in ("new", "begin", "end")]
        assert recorded == graphs
    events.clear()
    assert replay() is outputs
    assert events == ["replay graph 0", "all-reduce", "replay graph 1"][: 2 * processes - 1]


def test_record_step_ends_the_capture_after_an_error(events):
    def step(recorder):
        if recorder is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(()), torch.zeros(())

    with pytest.raises(torch.OutOfMemoryError):
        execution.record_step(step, [], {})
    assert events[-1] == "end graph 0"


def test_deterministic_restores_torchs_settings():
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with execution.deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert before == (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
