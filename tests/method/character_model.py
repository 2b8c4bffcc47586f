"""A character model, trained, quantised and trained again in NumPy alone: the whole method in small.

`run()` takes about a minute on one core; the tests call it with smaller sizes. Notebook 08 trains a like model.

    OMP_NUM_THREADS=1 python tests/method/character_model.py
"""

import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import littlebit.fast
import littlebit.reference as ref
import numpy as np
from littlebit.reference.train import cross_entropy, dense_parameters

TEXT = Path(littlebit.fast.__file__).with_name("data") / "lincoln_1862.txt"
CONTEXT = 8
HELD_OUT = 4096  # characters at the end of the text, for measuring


class Data(NamedTuple):
    """A text as one-hot contexts and next characters, made as they are needed."""

    alphabet: str
    windows: np.ndarray  # (n, CONTEXT + 1) codes

    def rows(self, chosen: np.ndarray | slice, dtype: type = np.float32) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (k, CONTEXT * len(alphabet)) and the codes (k,) of the characters that follow."""
        codes = self.windows[chosen]
        x = np.eye(len(self.alphabet), dtype=dtype)[codes[:, :-1]]  # (k, CONTEXT, len(alphabet))
        return x.reshape(len(codes), -1), codes[:, -1]

    def batches(self, steps: int, size: int, rng: np.random.Generator, dtype: type = np.float32) -> Iterator:
        """Random batches of `rows`."""
        for _ in range(steps):
            yield self.rows(rng.integers(0, len(self.windows), size), dtype)


class Report(NamedTuple):
    """What `run` measured on the held-out text, in nats per character."""

    bits: float  # stored bits per weight of the student
    teacher: float  # cross-entropy
    start: float  # cross-entropy of the student after initialisation
    end: float  # and after training
    kl_start: float
    kl_end: float
    losses: list[float]  # of each training step
    seconds: float


def read_data() -> tuple[Data, Data]:
    """Training and held-out text: lower case, white space as one blank."""
    text = " ".join(TEXT.read_text(encoding="utf-8").lower().split())
    alphabet = "".join(sorted(set(text)))
    codes = np.searchsorted(list(alphabet), list(text))
    windows = np.lib.stride_tricks.sliding_window_view(codes, CONTEXT + 1)
    return Data(alphabet, windows[: -HELD_OUT - CONTEXT]), Data(alphabet, windows[-HELD_OUT:])


def train_teacher(
    data: Data, hidden: int, steps: int, size: int, lr: float, rng: np.random.Generator, dtype: type = np.float32
) -> list[ref.Dense]:
    """A dense network, trained with a learning rate that falls to a tenth for the last third of the steps."""
    widths = [CONTEXT * len(data.alphabet), hidden, hidden, len(data.alphabet)]
    layers = [dense_start(d_out, d_in, rng, dtype) for d_in, d_out in pairwise(widths)]
    state = ref.adam_start(dense_parameters(layers))
    for step, (x, targets) in enumerate(data.batches(steps, size, rng, dtype)):
        layers, state, _ = ref.dense_step(layers, x, targets, state, lr if 3 * step < 2 * steps else lr / 10)
    return layers


def dense_start(d_out: int, d_in: int, rng: np.random.Generator, dtype: type) -> ref.Dense:
    """Weights of variance 2 / d_in (He et al., arXiv 1502.01852) and a zero bias."""
    return ref.Dense((rng.standard_normal((d_out, d_in)) * np.sqrt(2 / d_in)).astype(dtype), np.zeros(d_out, dtype))


def quantise(teacher: Sequence[ref.Dense], bits: float, paths: Sequence[int]) -> tuple[list[ref.Layer], float]:
    """Dual-SVID with so many paths for each layer, and the bits per weight that are then stored."""
    layers, stored = [], 0
    for layer, count in zip(teacher, paths, strict=True):
        ranks = [ref.rank_for_bits(*layer.weight.shape, bits, count)] * count
        layers.append(ref.Layer(ref.compensate(layer.weight, ranks), layer.bias))
        stored += ref.layer_bits(*layer.weight.shape, ranks)
    return layers, stored / sum(layer.weight.size for layer in teacher)


def distil(
    student: Sequence[ref.Layer],
    teacher: Sequence[ref.Dense],
    data: Data,
    steps: int,
    size: int,
    lr: float,
    rng: np.random.Generator,
    rule: str = "smooth_sign",
) -> tuple[list[ref.Layer], list[float]]:
    """QAT on the teacher's logits, with a learning rate that falls to a tenth for the last third of the steps."""
    batches = ((x, ref.dense_mlp(x, teacher)) for x, _ in data.batches(steps, size, rng))
    student, state, losses = ref.qat(student, (next(batches) for _ in range(2 * steps // 3)), lr, rule)
    student, _, last = ref.qat(student, batches, lr / 10, rule, state)
    return student, losses + last


def run(
    hidden: int = 256,
    bits: float = 1.0,
    paths: Sequence[int] = (2, 2, 1),
    teacher_steps: int = 2000,
    steps: int = 4000,
    size: int = 256,
    lr: float = 2e-3,
    seed: int = 0,
    rule: str = "smooth_sign",
) -> Report:
    """Train a teacher, quantise it to so many bits per weight, train the student on it, and measure all three."""
    begin = time.perf_counter()
    rng = np.random.default_rng(seed)
    data, held_out = read_data()
    teacher = train_teacher(data, hidden, teacher_steps, size, 1e-3, rng)
    start, stored = quantise(teacher, bits, paths)
    end, losses = distil(start, teacher, data, steps, size, lr, rng, rule)
    x, targets = held_out.rows(slice(None))
    wanted = ref.dense_mlp(x, teacher)
    before, after = ref.mlp(x, start), ref.mlp(x, end)
    return Report(
        stored,
        *(float(cross_entropy(logits, targets)) for logits in (wanted, before, after)),
        *(float(ref.kl_loss(logits, wanted)) for logits in (before, after)),
        losses,
        time.perf_counter() - begin,
    )


if __name__ == "__main__":
    for name, value in run()._replace(losses=[])._asdict().items():
        print(name, value)
