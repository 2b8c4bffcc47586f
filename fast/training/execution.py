"""Run a training step fast and reproducibly: deterministic algorithms, torch.compile and CUDA graphs."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..models.blocks import decoder_blocks
from .student import ShardedStudent, StackedStudent, copy_state, fold

RECOMPILE_LIMIT = 64  # enough for several training runs in one process, each with its own sizes
EAGER_STEPS = 3  # Before a capture, libraries choose kernels and allocate workspaces in these steps.


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Restrict torch to algorithms that give the same bits each time, while the context is active."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@contextlib.contextmanager
def compiled(wanted: bool, student: StackedStudent | ShardedStudent, teacher: nn.Module) -> Iterator[None]:
    """Compile the blocks of both models and the folding, while the context is active.

    Blocks with the same shapes share their compiled code.
    """
    if not wanted or not isinstance(student, StackedStudent):
        yield
        return
    blocks = [*decoder_blocks(student.model), *decoder_blocks(teacher)]
    student.fold = torch.compile(fold, dynamic=True)
    for block in blocks:  # Only `forward` is compiled, so hooks stay outside of the compiled code.
        block.forward = torch.compile(block.forward, dynamic=False)  # type: ignore[method-assign]
    try:
        # Floats are constants: torch 2.11 cannot trace a derivative that reads a global float as a symbol.
        settings = {"recompile_limit": RECOMPILE_LIMIT, "specialize_float": True}
        with torch._dynamo.config.patch(settings):  # type: ignore[attr-defined]
            yield
    finally:
        student.fold = fold
        for block in blocks:
            del block.forward


def zero_gradients(parameters: Iterable[Tensor]) -> None:
    """Set gradients to None, so that the next backward pass allocates them."""
    for parameter in parameters:
        parameter.grad = None


class GraphRecorder:
    """Record a training step as CUDA graphs, with functions between them that run eagerly.

    A replay launches all kernels of a graph at once, so a small step is not limited by Python.
    """

    def __init__(self) -> None:
        self.parts: list[Callable[[], None]] = []
        self.pool = torch.cuda.graph_pool_handle()
        self.context: torch.cuda.graph | None = None

    def begin(self) -> None:
        """Begin to capture a graph; all graphs share one memory pool."""
        graph = torch.cuda.CUDAGraph()
        self.context = torch.cuda.graph(graph, pool=self.pool)
        self.context.__enter__()
        self.parts.append(graph.replay)

    def end(self) -> None:
        """End the capture of the current graph."""
        assert self.context is not None
        self.context.__exit__(None, None, None)
        self.context = None

    def run_eagerly(self, function: Callable[[], None]) -> None:
        """Let each replay call a function here: end the current graph, and begin another after the function."""
        self.end()
        self.parts.append(function)
        self.begin()

    def replay(self) -> None:
        """Run the recorded step again."""
        for part in self.parts:
            part()


def record_step(
    step: Callable[[GraphRecorder | None], tuple[Tensor, Tensor]],
    parameters: Iterable[Tensor],
    state: Mapping[str, Tensor],
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Record a training step as CUDA graphs, and return a function that replays it.

    Parameters
    ----------
    step : callable
        Runs the step: eagerly if it is given None, else while the recorder captures it.
    parameters : iterable of tensors
        The trained tensors.
    state : mapping of str to tensor
        Tensors that the step changes. They are restored after the recording.

    Returns
    -------
    A function that runs the step and returns its outputs, always in the same two tensors.
    """
    parameters = list(parameters)
    before = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(EAGER_STEPS):
            step(None)
    torch.cuda.current_stream().wait_stream(stream)
    zero_gradients(parameters)  # The graph must allocate the gradients in its own memory.
    recorder = GraphRecorder()
    recorder.begin()
    try:
        outputs = step(recorder)
    finally:
        recorder.end()
    copy_state(state, before)

    def replay() -> tuple[Tensor, Tensor]:
        recorder.replay()
        return outputs

    return replay
