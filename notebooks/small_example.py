"""The small example that the notebooks carry from step to step: the network that `littlebit_from_zero` trains.

    python -m littlebit.notebooks.small_example FILE.npz

trains it again and stores it, so that a notebook need not wait for it.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import littlebit_from_zero as zero

STORED = Path(__file__).with_suffix(".npz")


class Network(NamedTuple):
    """Hold a dense network: logits = output relu(weight x + bias) + output_bias.

    Attributes
    ----------
    weight : (256, 224) the matrix that the notebooks quantize
    bias : (256,)
    output : (28, 256)
    output_bias : (28,)
    """

    weight: np.ndarray
    bias: np.ndarray
    output: np.ndarray
    output_bias: np.ndarray


def network() -> Network:
    """Read the stored teacher, in float64 (it is stored in float16)."""
    with np.load(STORED) as arrays:
        return Network(*(arrays[name].astype(float) for name in Network._fields))


def held_out() -> tuple[np.ndarray, np.ndarray]:
    """Encode the text that the teacher has not read: inputs (1000, 224), and the next characters as ones (1000, 28)."""
    x, p = zero.examples(zero.TEXT)
    return x[-zero.HELD_OUT :], p[-zero.HELD_OUT :]


def nats(y: np.ndarray, p: np.ndarray, teacher: Network) -> float:
    """Compute the cross-entropy of the teacher with another first layer, in nats per character.

    Parameters
    ----------
    y : (n, 256) array
        Output of the first layer, without its bias.
    p : (n, 28) array
        Next characters, as ones.
    teacher : Network
    """
    logits = np.maximum(y + teacher.bias, 0) @ teacher.output.T + teacher.output_bias
    return float(-(p * zero.log_softmax(logits)).sum(axis=1).mean())


def main() -> None:
    """Train the teacher and store it."""
    x, p = zero.examples(zero.TEXT)
    last = len(x) - zero.HELD_OUT - zero.CONTEXT
    arrays = zero.train_teacher(x[:last], p[:last])
    stored = {name: array.astype(np.float16) for name, array in zip(Network._fields, arrays, strict=True)}
    np.savez_compressed(sys.argv[1], **stored)


if __name__ == "__main__":
    main()
