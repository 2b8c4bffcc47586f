"""Estimate what a training takes: memory on each device, memory of the host, and time, from the sizes of a model."""

from typing import NamedTuple

#: bfloat16 operations per second, in 10^12, that a step reaches on one GPU, recomputing included: measured with 4
#: sequences of 2048 at the shape of Llama-2-7B on an H200 (results/training_large.json). One sequence reaches a third.
GPU_TFLOPS = 300.0
PROCESS_BYTES = 550_000_000  # Python with torch and transformers, before a model
FLOAT_BYTES, HALF_BYTES = 4, 2
STATE_NUMBERS = 4  # of each trained number: itself, its gradient and Adam's two moments


class Workload(NamedTuple):
    """Describe how a model is trained.

    Attributes
    ----------
    tokens : int
        Training tokens; 0 for no training.
    gpus : int
        GPUs, over which masters and teacher are sharded, with recomputed blocks; 0 trains on the CPU.
    sequence : int
        Tokens in a sequence.
    sequences : int
        Sequences that one device computes at once.
    tflops : float
        Speed of one GPU in 10^12 operations per second.
    """

    tokens: int = 0
    gpus: int = 0
    sequence: int = 256
    sequences: int = 1
    tflops: float = GPU_TFLOPS


class TrainedSizes(NamedTuple):
    """Hold the sizes of a model that training depends on.

    Attributes
    ----------
    weights : int
        Weights of the quantized layers.
    tables : int
        All other parameters: embedding, head, norms, biases.
    latents, scales : int
        Numbers in the latent factors, and in the scales.
    blocks, hidden, vocabulary : int
    widths : int
        Inputs, latents and outputs of all quantized layers, for one token.
    """

    weights: int
    tables: int
    latents: int
    scales: int
    blocks: int
    hidden: int
    vocabulary: int
    widths: int


def device_bytes(sizes: TrainedSizes, work: Workload) -> dict[str, int]:
    """Count the bytes on each GPU, or on the CPU, by part.

    Returns
    -------
    dict of part to bytes: states (masters, gradients, moments), teacher, gathered (weights of a forward pass),
    activations, and what the whole models take beyond that before they are sharded.
    """
    if not work.gpus:
        tokens, block = work.sequence * work.sequences, sizes.widths // sizes.blocks + 6 * sizes.hidden
        return {
            "states": FLOAT_BYTES * (STATE_NUMBERS * (sizes.latents + sizes.scales) + sizes.tables),
            "teacher": FLOAT_BYTES * (sizes.weights + sizes.tables),
            "gathered": FLOAT_BYTES * sizes.latents,
            "activations": FLOAT_BYTES * tokens * (sizes.blocks * block + 4 * sizes.vocabulary),
        }
    parts = {
        "states": FLOAT_BYTES * (STATE_NUMBERS * (sizes.latents + sizes.scales) + sizes.tables) // work.gpus,
        "teacher": HALF_BYTES * (sizes.weights + sizes.tables) // work.gpus,
    }
    parts |= max(after_loss(sizes, work), end_of_backward(sizes, work), key=lambda phase: sum(phase.values()))
    whole = HALF_BYTES * sizes.weights + FLOAT_BYTES * sizes.latents + (HALF_BYTES + FLOAT_BYTES) * sizes.tables
    return parts | {"whole models before sharding": max(0, whole - sum(parts.values()))}


def after_loss(sizes: TrainedSizes, work: Workload) -> dict[str, int]:
    """Count what a GPU holds beside the states when the loss is known, in bytes: the blocks' inputs, and the logits.

    One block at a time is gathered in bfloat16, while the next one is on its way. Embedding and head of both models
    stay. The logits are two in bfloat16, and the two in float32 whose difference is the gradient.
    """
    token = HALF_BYTES * sizes.blocks * sizes.hidden + (2 * HALF_BYTES + 2 * FLOAT_BYTES) * sizes.vocabulary
    blocks = 2 * (sizes.latents + sizes.weights) // sizes.blocks
    return {
        "gathered": HALF_BYTES * (blocks + 2 * sizes.tables),
        "activations": work.sequence * work.sequences * token,
    }


def end_of_backward(sizes: TrainedSizes, work: Workload) -> dict[str, int]:
    """Count what a GPU holds beside the states at the end of the backward pass, in bytes: one block, computed again.

    Its gradients are added over the GPUs in float32.
    """
    latents, token = sizes.latents // sizes.blocks, HALF_BYTES * (sizes.widths // sizes.blocks + 6 * sizes.hidden)
    gradients = latents * (HALF_BYTES + FLOAT_BYTES) + latents * FLOAT_BYTES // work.gpus
    return {
        "gathered": HALF_BYTES * (2 * latents + 2 * sizes.tables) + gradients,
        "activations": work.sequence * work.sequences * token,
    }


def host_bytes(sizes: TrainedSizes, work: Workload) -> int:
    """Count the bytes of host memory of all processes together: each keeps a student; the first gathers a state."""
    if not work.gpus:
        return PROCESS_BYTES + sum(device_bytes(sizes, work).values())
    student = FLOAT_BYTES * (sizes.latents + sizes.scales + sizes.tables)
    return work.gpus * (PROCESS_BYTES + student) + 3 * FLOAT_BYTES * (sizes.latents + sizes.scales)


def multiplications_per_token(sizes: TrainedSizes, work: Workload) -> int:
    """Count the multiplications in the matrix products of training on one token.

    The teacher computes once forward. The student computes once forward, once more if its blocks are recomputed, and
    twice backward. A token attends to half of its sequence on average, in two products.
    """
    head, attention = sizes.vocabulary * sizes.hidden, sizes.blocks * work.sequence * sizes.hidden
    passes = 4 if work.gpus else 3
    return sizes.weights + attention + head + passes * (sizes.latents + attention) + 3 * head


def seconds(sizes: TrainedSizes, work: Workload, cpu_rate: float) -> float:
    """Estimate the time of a training from the speed of its GPUs, or from `cpu_rate` multiplications per second."""
    rate = work.gpus * work.tflops * 1e12 / 2 if work.gpus else cpu_rate
    return work.tokens * multiplications_per_token(sizes, work) / rate
