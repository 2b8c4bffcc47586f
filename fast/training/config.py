"""Hold the settings of a training run, and check them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...reference._renamed import renamed_keywords
from .._checks import check_number
from ..signs import named_rule
from .student import check_trainable

OPTIMIZERS = ("adam", "muon")

#: Old name -> new name of a setting, for one version: keywords of TrainConfig, and settings in saved states.
RENAMED_SETTINGS = {
    "tokens": "total_tokens",
    "sequence": "sequence_length",
    "batch": "batch_size",
    "final": "final_lr_fraction",
    "clip": "max_grad_norm",
    "hidden": "hidden_loss_weight",
    "normalise": "normalize",
}


@renamed_keywords(**RENAMED_SETTINGS)
@dataclass(frozen=True)
class TrainConfig:
    """Set how to train.

    The defaults are close to the settings that trained the bundled checkpoints. `book/training.md` compares others.

    Attributes
    ----------
    total_tokens : int
        Training tokens in all, rounded down to whole steps.
    sequence_length : int
        Tokens in a sequence. A student works well up to about the length that it was trained at.
    batch_size : int
        Sequences in a step, over all processes.
    micro_batch : int, optional
        Sequences that a process computes at once; their gradients accumulate. None: all of its sequences.
    lr_latents, lr_scales, lr_others : float
        Peak learning rates of latents (u, v), scales (h, ell, g) and other trained parameters.
    train : str
        Which other parameters to train: "none", "norms" (and biases) or "all" (embeddings and head too).
    rule : str
        Gradient of the sign function: a name in `signs.RULES`.
    hidden_loss_weight : float
        Weight of the hidden-state loss, summed over blocks. It follows the learning-rate schedule. 0 disables the loss.
    normalize : bool
        Whether to divide that loss by the teacher's mean square at each position (see `distill.hidden_loss`).
    block_tokens : int
        Tokens of a first phase that trains each block alone. A block reads the output of the teacher's block before it
        and learns the output of the teacher's own block. See `phases.phases`.
    long_tokens : int
        Tokens of a last phase with sequences of `long_sequence`. A step has as many tokens as before.
    long_sequence : int
        Tokens in a sequence of that phase.
    frozen_tokens : int
        Tokens of a last phase that trains scales and other parameters, with the signs frozen.
    label_weight : float
        Share of the text's own next token in the target distribution. 0: the teacher's distribution alone
        (distillation). 1: the next token alone (language-model cross-entropy).
    latent_scale : float
        Root mean square to scale the latents of every path to before training. The same learning rate then suits all
        layers, and few latents are too large for the straight-through rule to move them. 0: leave the latents alone.
    optimizer : str
        Optimizer of the latents: "adam" (AdamW without weight decay) or "muon" (see `muon.Muon`).
    warmup : float
        Fraction of the schedule in which the learning rates rise linearly. Then they fall along a cosine.
    final_lr_fraction : float
        Last learning rate over the peak learning rate.
    betas : (float, float)
        Momentum coefficients of AdamW.
    max_grad_norm : float
        Gradients are clipped to this norm, taken over all parameters. 0: no clipping.
    seed : int
        Seed of the data order.
    """

    total_tokens: int = 4_194_304
    sequence_length: int = 1024
    batch_size: int = 4
    micro_batch: int | None = None
    lr_latents: float = 6e-3
    lr_scales: float = 1.5e-3
    lr_others: float = 4e-4
    train: str = "norms"
    rule: str = "straight_through"
    hidden_loss_weight: float = 0.1
    normalize: bool = True
    block_tokens: int = 0
    long_tokens: int = 0
    long_sequence: int = 2048
    frozen_tokens: int = 0
    label_weight: float = 0.0
    latent_scale: float = 0.0
    optimizer: str = "adam"
    warmup: float = 0.02
    final_lr_fraction: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    seed: int = 0

    @property
    def step_tokens(self) -> int:
        """Count the tokens of a step, over all processes."""
        return self.sequence_length * self.batch_size

    @property
    def steps(self) -> int:
        """Count the steps."""
        return max(1, self.total_tokens // self.step_tokens)


def with_new_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rename settings that an older version saved, by RENAMED_SETTINGS.

    Examples
    --------
    >>> with_new_names({"tokens": 1024, "seed": 0})
    {'total_tokens': 1024, 'seed': 0}
    """
    return {RENAMED_SETTINGS.get(name, name): value for name, value in settings.items()}


def check_config(config: TrainConfig, world_size: int) -> None:
    """Raise ValueError unless every setting is in range and a step divides evenly among the processes."""
    named_rule(config.rule)
    check_trainable(config.train)
    smallest = dict.fromkeys(("total_tokens", "sequence_length", "batch_size", "long_sequence"), 1)
    smallest |= dict.fromkeys(("block_tokens", "long_tokens", "frozen_tokens", "seed"), 0)
    for key, low in smallest.items():
        check_number(key, getattr(config, key), low=low, below=2**63, whole=True)
    if config.micro_batch is not None:
        check_number("micro_batch", config.micro_batch, low=1, whole=True)
    check_step_divides(config, world_size)
    if config.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {config.optimizer!r}")
    check_number("warmup", config.warmup, low=0, below=1)
    check_number("label_weight", config.label_weight, low=0, high=1)
    rates = ("lr_latents", "lr_scales", "lr_others", "final_lr_fraction")
    for key in (*rates, "hidden_loss_weight", "max_grad_norm", "latent_scale"):
        check_number(key, getattr(config, key), low=0)
    for beta in config.betas:
        check_number("betas", beta, low=0, below=1)


def check_step_divides(config: TrainConfig, world_size: int) -> None:
    """Raise ValueError unless a step divides evenly into processes, micro-batches and long sequences."""
    if config.batch_size % world_size:
        raise ValueError(
            f"batch_size must be a multiple of the number of processes, got {config.batch_size} sequences for "
            f"{world_size} processes"
        )
    sequences = config.batch_size // world_size
    micro_batch = sequences if config.micro_batch is None else config.micro_batch
    if micro_batch < 1 or sequences % micro_batch:
        raise ValueError(
            f"micro_batch must divide the {sequences} sequences that a process computes in a step, got {micro_batch}"
        )
    if config.long_tokens and sequences * config.sequence_length % config.long_sequence:
        raise ValueError(
            f"long_sequence must divide the {sequences} x {config.sequence_length} tokens that a process computes in a "
            f"step, got {config.long_sequence}"
        )
