"""Add warp shuffles to numba-cuda's simulator, and let a block's threads wait without polling.

Import it before any kernel is defined, in a process that set NUMBA_ENABLE_CUDASIM=1. A lane outside the mask, and lanes
of a warp that call different shuffles, raise errors here. On a GPU the result would be undefined, or the kernel would
hang.
"""

import threading
import time
from types import SimpleNamespace

import numpy as np
from numba import cuda
from numba.cuda.simulator import kernel, kernelapi

TIMEOUT = 60.0  # seconds that a lane waits for the others, on a busy machine


class Warp:
    """The values that the lanes of a warp exchange."""

    def __init__(self):
        self.arrival = threading.Condition()
        self.exchanges = {}
        self.turns = {}


def exchange(operation, mask, value):
    """Give a value to all lanes in the mask; return this lane's number and a dict of all lanes' values."""
    thread = threading.current_thread()
    number, lane = divmod(thread.thread_id, 32)
    alive = min(32, int(np.prod(thread._manager._block_dim)) - 32 * number)
    warp = thread._manager.__dict__.setdefault("warps", {}).setdefault(number, Warp())
    mask = int(mask) & 0xFFFFFFFF
    if not mask >> lane & 1:
        raise RuntimeError(f"{operation}: a calling lane must be in the mask, got lane {lane} and mask {mask:#x}")
    expected = [other for other in range(alive) if mask >> other & 1]
    with warp.arrival:
        turn = warp.turns[lane, mask] = warp.turns.get((lane, mask), -1) + 1
        here = warp.exchanges.setdefault(
            (mask, turn), SimpleNamespace(values={}, left=len(expected), operation=operation)
        )
        if here.operation != operation:
            raise RuntimeError(f"divergent warp: lane {lane} in {operation}, others in {here.operation}")
        here.values[lane] = value
        if len(here.values) == len(expected):
            warp.arrival.notify_all()
        end = time.monotonic() + TIMEOUT
        while len(here.values) < len(expected):
            warp.arrival.wait(0.25)
            missing = sorted(set(expected) - set(here.values))
            if thread.abort:
                raise RuntimeError("aborted")
            if missing and time.monotonic() > end:
                raise RuntimeError(f"{operation}: lanes {missing} never arrived")
        here.left -= 1
        if not here.left:
            del warp.exchanges[mask, turn]
    return lane, here.values


def shuffle(self, mask, value, source):
    """Return the value of lane `source`."""
    _, values = exchange("shfl_sync", mask, value)
    return values[int(source) % 32]


def shuffle_xor(self, mask, value, distance):
    """Return the value of the lane whose number is this lane's XOR `distance`."""
    lane, values = exchange("shfl_xor_sync", mask, value)
    return values[lane ^ int(distance)]


def run_block(self, grid_point, *args):
    """Run a block's threads; release a barrier when all live threads have reached it."""

    def body():
        with np.errstate(over="ignore"):  # unsigned words wrap around
            self._f(*args)

    threads = [kernel.BlockThread(body, self, grid_point, point, self._debug) for point in np.ndindex(*self._block_dim)]
    for thread in threads:
        thread.start()
    alive, pause = list(threads), 2e-5
    while alive:
        failed = next((thread for thread in alive if thread.exception), None)
        if failed:
            for thread in threads:
                thread.abort, thread.syncthreads_blocked = True, False
                thread.syncthreads_event.set()
            break
        if all(thread.syncthreads_blocked for thread in alive):
            for thread in alive:
                thread.syncthreads_blocked = False
            for thread in alive:
                thread.syncthreads_event.set()
            pause = 2e-5
        else:
            time.sleep(pause)
            pause = min(1.5 * pause, 1e-3)
        alive = [thread for thread in alive if thread.is_alive()]
    for thread in threads:
        if thread.exception:
            raise thread.exception[0].with_traceback(thread.exception[1])


kernelapi.FakeCUDAModule.shfl_sync = shuffle
kernelapi.FakeCUDAModule.shfl_xor_sync = shuffle_xor
kernel.BlockManager.run = run_block
simulated_jit = cuda.jit


def jit(*args, **options):
    """Decorate a kernel or device function for the simulator."""
    options.pop("forceinline", None)  # the simulator does not know it
    return simulated_jit(*args, **options)


cuda.jit = jit
