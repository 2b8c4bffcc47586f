"""Quantisation-aware training of a whole language model: a LittleBit student learns its teacher's logits.

One step (LittleBit, arXiv 2506.13771, the section on quantisation-aware training): the student's weights are folded
from float32 masters, both models read the same tokens, the loss is KL(teacher || student) plus, if wanted, the error
of the hidden states, and AdamW moves latents, scales and norms at rates of their own.

On a GPU the step is compiled piece by piece and captured in CUDA graphs, so that a small step costs what its
arithmetic costs. A run killed at any moment goes on from its last state and ends with the same bits (see `resume`).
"""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from .._checks import check_number, check_positions, flat_tokens, positions_of
from .._progress import tqdm
from ..distill import KLLoss, hidden_loss, kl_rows
from ..files.digests import tensors_digest
from ..models.experts import has_experts
from ..models.wrappers import to_change, with_adapters_inside
from ..signs import named_rule
from .causal_attention import causal_attention, is_plainly_causal
from .muon import Muon
from .resume import Keeper
from .student import (
    Masters,
    ShardedStudent,
    StackedStudent,
    blocks,
    check_trainable,
    fold,
    littlebit_layers,
    scale_latents_,
    shard_,
    whole,
)

OPTIMIZERS = ("adam", "muon")  # what moves the latents
RECOMPILE_LIMIT = 64  # several trainings in one process, each with sizes of its own
EAGER_STEPS = 3  # before a capture: libraries choose kernels and allocate workspaces in them


class TrainingError(RuntimeError):
    """Training that cannot go on; the last saved state stays."""


class TrainingStopped(RuntimeError):  # noqa: N818 (not an error)
    """Training that was told to stop, by SIGTERM or SIGINT; its state is saved."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the defaults are close to what trained the shipped checkpoints (`book/training.md` has the rest).

    Attributes
    ----------
    tokens : int
        Training tokens in all, in whole steps.
    sequence : int
        Tokens in a sequence. A student is good up to about the length that it was trained at.
    batch : int
        Sequences in a step, over all processes.
    micro_batch : int, optional
        Sequences that a process handles at once; the gradients of several add up. None: all of its part of a step.
    lr_latents, lr_scales, lr_others : float
        Highest learning rates of latents (u, v), scales (h, ell, g) and other trained parameters.
    train : str
        Which other parameters are trained: "none", "norms" (and biases) or "all" (embeddings and head too).
    rule : str
        What the derivative of a sign is taken for: a name in `signs.RULES`.
    hidden : float
        Weight of the hidden-state loss, summed over blocks; it falls with the learning rates. 0 leaves it out.
    normalise : bool
        Whether that loss is relative to each position's size (see `distill.hidden_loss`).
    block_tokens : int
        How many of the first tokens train every block by itself: it reads what the teacher's block before it writes,
        and learns what the teacher's block makes of it. See `phases`.
    long_tokens : int
        How many of the last tokens are read in sequences of `long_sequence`, with as many tokens a step as before.
    long_sequence : int
    frozen_tokens : int
        How many of the last tokens train scales and other parameters alone, with the signs as they are.
    label_weight : float
        Share of the text's own next token in the distribution that is learned; 0 is the teacher's distribution alone,
        1 the usual cross-entropy of language models.
    latent_scale : float
        Root mean square that the latents of every path are scaled to before training, so that one learning rate means
        the same for all layers, and few are so large that the straight-through rule never moves them. 0 leaves them
        as the initialiser found them.
    optimizer : str
        What moves the latents: "adam", or "muon" (see `muon.Muon`).
    warmup : float
        Part of the schedule in which the rates rise; then they fall along a cosine to `final` times the highest.
    final : float
    betas : (float, float)
        Of AdamW; there is no weight decay.
    clip : float
        Largest norm of all gradients together; 0 for no clipping.
    seed : int
        Of the order of the data.
    """

    tokens: int = 4_194_304
    sequence: int = 1024
    batch: int = 4
    micro_batch: int | None = None
    lr_latents: float = 6e-3
    lr_scales: float = 1.5e-3
    lr_others: float = 4e-4
    train: str = "norms"
    rule: str = "straight_through"
    hidden: float = 0.1
    normalise: bool = True
    block_tokens: int = 0
    long_tokens: int = 0
    long_sequence: int = 2048
    frozen_tokens: int = 0
    label_weight: float = 0.0
    latent_scale: float = 0.0
    optimizer: str = "adam"
    warmup: float = 0.02
    final: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    seed: int = 0

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, over all processes."""
        return self.sequence * self.batch

    @property
    def steps(self) -> int:
        """Steps in all."""
        return max(1, self.tokens // self.step_tokens)


class Phase(NamedTuple):
    """Steps of a training that are alike, from step `first` to before step `last`.

    Attributes
    ----------
    first, last : int
    begin, end : int
        Steps between which the learning rates run their schedule, which may span several phases.
    sequence : int
        Tokens in a sequence.
    blocks : bool
        Whether every block is trained by itself.
    frozen : bool
        Whether the signs stay as they are.
    """

    first: int
    last: int
    begin: int
    end: int
    sequence: int
    blocks: bool
    frozen: bool


def phases(config: TrainConfig) -> list[Phase]:
    """List the phases of a training: blocks by themselves, the whole model, then with frozen signs.

    Each of these three has a learning-rate schedule of its own and starts with Adam's moments at zero. The longer
    sequences begin where they begin, in the middle of a schedule as a rule.

    Examples
    --------
    >>> config = TrainConfig(tokens=800, sequence=5, batch=2, block_tokens=100, long_tokens=200, long_sequence=10)
    >>> [(phase.first, phase.last, phase.begin, phase.sequence) for phase in phases(config)]
    [(0, 10, 0, 5), (10, 60, 10, 5), (60, 80, 10, 10)]
    """
    steps = config.steps
    blocks, long, frozen = (
        min(steps, tokens // config.step_tokens)
        for tokens in (config.block_tokens, config.long_tokens, config.frozen_tokens)
    )
    freeze = max(blocks, steps - frozen)
    schedules = {0, blocks, freeze, steps}
    cuts = sorted({*schedules, steps - long})
    return [
        Phase(
            first,
            last,
            max(cut for cut in schedules if cut <= first),
            min(cut for cut in schedules if cut >= last),
            config.sequence if first < steps - long else config.long_sequence,
            first < blocks,
            first >= freeze,
        )
        for first, last in pairwise(cuts)
    ]


def train_(
    model: nn.Module,
    teacher: nn.Module,
    tokens: Tensor | Sequence[Tensor],
    config: TrainConfig | None = None,
    weights: Sequence[float] | None = None,
    keeper: Keeper | None = None,
    dtype: torch.dtype | None = None,
    compile: bool = True,
    shard: bool = False,
    log_steps: int = 20,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train a quantised model on its teacher's logits, in place.

    Started by torchrun (with torch.distributed initialised), every process trains on its part of each step.

    Parameters
    ----------
    model : transformers causal language model after `quantize_`, float32
    teacher : the model that it was made from, on the same device
        Its parameters are rounded to `dtype`, in place.
    tokens : (n,) or (1, n) integer tensor, or several
        Training texts.
    config : TrainConfig, optional
    weights : sequence of float, optional
        How often a sequence comes from each of the texts; by default in proportion to their lengths.
    keeper : resume.Keeper, optional
        Keeps the state and the log in a folder; if there is a state of this run, training goes on from it.
    dtype : torch.dtype, optional
        That both models compute in; by default bfloat16 on a GPU and float32 on a CPU.
    compile : bool
        Whether to compile, on a GPU.
    shard : bool
        Divide masters and teacher over the processes (FSDP2), for models that do not fit one GPU.
    log_steps : int
        Steps between entries of the log.
    progress : bool

    Returns
    -------
    The log, a dict for every `log_steps` steps: step, tokens, loss (nats, mean of those steps), grad_norm, lr (of the
    latents), tokens_per_s, memory_bytes (largest so far on the GPU; 0 on a CPU).

    Raises
    ------
    ValueError
        If the model is not quantised or has adapters of PEFT, teacher and student do not fit each other, a text is too
        short, a setting is out of range, or the keeper holds the state of another run.
    TrainingError
        If the loss is not finite or memory runs out; the last saved state stays.
    TrainingStopped
        After SIGTERM or SIGINT, once the state is saved.
    OSError
        If another process trains with the keeper's folder.
    """
    config = config or TrainConfig()
    texts = [tokens] if isinstance(tokens, Tensor) else list(tokens)
    rank, world = process()
    check_config(config, world)
    model, teacher = to_change(model, "train_"), with_adapters_inside(teacher)
    check_models(model, teacher)
    texts = [checked_text(text, model, longest(config)) for text in texts]
    device = next(model.parameters()).device
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    starts = schedules([len(text) for text in texts], weights, config)
    corpus = torch.cat([text.to(torch.int32) for text in texts])
    if shard and not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError("shard divides the masters over processes: start them with torchrun")
    if shard and config.optimizer == "muon":
        raise ValueError("muon needs whole latents, but shard divides them: use the optimizer adam with shard")
    check_number("log_steps", log_steps, low=1, whole=True)
    if keeper is not None:
        kind = {"dtype": str(dtype), "device": device.type}
        keeper.check(asdict(config) | kind | {"world": world, "shard": shard, "data": tensors_digest(corpus, *starts)})
    capture = device.type == "cuda" and not shard and is_plainly_causal(model, longest(config))
    capture = capture and not has_experts(model)  # which experts run depends on the text
    compile = compile and capture
    for parameter in model.parameters() if world > 1 else ():  # each process's factors may be rounded differently
        distributed.broadcast(parameter.data, 0)
    try:
        teacher.to(dtype).requires_grad_(False)  # type: ignore[call-arg]
        if config.latent_scale:
            scale_latents_(model, config.latent_scale)
        student = (ShardedStudent if shard else StackedStudent)(model, config.rule, config.train, dtype)
        if shard:
            shard_(teacher, dtype)
        with contextlib.ExitStack() as during:
            if keeper is not None and rank == 0:
                during.enter_context(keeper.alone())
            during.enter_context(deterministic())
            if capture:
                for each in (model, teacher):
                    during.enter_context(causal_attention(each))
            during.enter_context(compiled(compile, student, teacher))
            mine = [part[:, rank::world] for part in starts]
            run = Run(student, teacher, corpus.to(device), mine, config, keeper, capture)
            if compile:
                run.kl_rows = torch.compile(kl_rows, dynamic=False)
                run.hidden_loss = torch.compile(hidden_loss, dynamic=False)
            log = run.run(log_steps, progress and rank == 0)
    except torch.OutOfMemoryError as error:
        at_once = config.micro_batch or config.batch // world
        raise TrainingError(
            f"out of memory with {at_once} sequences of {config.sequence} tokens at once: lower micro_batch, or divide "
            f"the masters over several GPUs ({error})"
        ) from error
    student.finish()
    return log


class Run:
    """One training run: the step, the loop around it, and its state."""

    def __init__(
        self,
        student: StackedStudent | ShardedStudent,
        teacher: nn.Module,
        corpus: Tensor,
        starts: list[Tensor],
        config: TrainConfig,
        keeper: Keeper | None,
        capture: bool,
    ):
        self.capture = capture
        self.student, self.teacher, self.corpus, self.config, self.keeper = student, teacher, corpus, config, keeper
        self.device = corpus.device
        self.on_gpu = self.device.type == "cuda"
        self.rank, self.world = process()
        self.phases = phases(config)
        self.starts = [part.to(self.device) for part in starts]  # one a phase: (steps, sequences of this process)
        self.tokens = torch.empty(0)  # what a step reads: the same memory in each step of a phase, for captured steps
        self.loss, self.norm, self.hidden_weight = torch.zeros(3, device=self.device)
        self.kl_rows: Callable[..., tuple[Tensor, Tensor]] = kl_rows
        self.hidden_loss: Callable[[Tensor, Tensor, bool], Tensor] = hidden_loss
        self.history: list[dict[str, float]] = []
        self.step = 0
        self.losses: list[Tensor] = []  # of the steps since the last entry of the log
        masters = student.masters()
        self.masters = masters.named()
        self.optimizers, self.groups = optimizers(masters, config, self.device)
        self.prime_optimizers()

    def prime_optimizers(self) -> None:
        """Let the optimisers allocate their state, which stays zero."""
        for master in self.masters.values():
            master.grad = torch.zeros_like(master)
        self.update_masters()
        self.forget_gradients()
        self.forget_moments()

    def update_masters(self) -> None:
        """Move all masters along their gradients."""
        for optimizer in self.optimizers:
            optimizer.step()

    def forget_gradients(self) -> None:
        """Let every master be without a gradient."""
        for master in self.masters.values():
            master.grad = None

    def forget_moments(self) -> None:
        """Set the optimisers' moments and step counts to zero."""
        for tensor in self.optimizer_state().values():
            tensor.zero_()

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimisers' moments and step counts by the names of the masters."""
        return {
            f"{name}.{key}": tensor
            for name, master in self.masters.items()
            for optimizer in self.optimizers
            for key, tensor in optimizer.state.get(master, {}).items()
        }

    def state(self) -> dict[str, Tensor]:
        """All tensors that a step changes."""
        return {name: master.detach() for name, master in self.masters.items()} | self.optimizer_state()

    def batch(self, step: int) -> Tensor:
        """Tokens of a step, (sequences, sequence)."""
        phase, starts = next(pair for pair in zip(self.phases, self.starts, strict=True) if step < pair[0].last)
        offsets = torch.arange(phase.sequence, device=self.device)
        return self.corpus[starts[step - phase.first][:, None] + offsets].long()

    def run(self, log_steps: int, progress: bool) -> list[dict[str, float]]:
        """All steps that are not done yet."""
        self.restore()
        with (
            stop_signals() as stop,
            tqdm(
                total=self.config.steps * self.config.step_tokens,
                initial=self.step * self.config.step_tokens,
                desc="training",
                unit="token",
                unit_scale=True,
                disable=not progress,
            ) as bar,
        ):
            for phase in self.phases:
                if self.step < phase.last:
                    if self.step == phase.begin:
                        self.forget_moments()
                    self.tokens = self.batch(self.step)
                    with self.tapped(phase.blocks):
                        self.loop(phase, log_steps, stop, bar)
        return self.history

    def loop(self, phase: Phase, log_steps: int, stop: list[int], bar: tqdm) -> None:
        """The steps of a phase that are not done yet."""
        backward, update = self.prepared(self.block_loss if phase.blocks else self.logit_loss)
        begin, done = time.perf_counter(), self.step
        while self.step < phase.last:
            self.tokens.copy_(self.batch(self.step))
            self.set_rates(phase)
            backward()
            self.average_gradients()
            update()
            self.losses.append(self.loss.clone())
            self.step += 1
            logging = self.step % log_steps == 0 or self.step == phase.last
            if logging:
                self.log(self.step - done, begin, bar)
                begin, done = time.perf_counter(), self.step
            if self.world == 1 or logging:
                self.keep(bool(stop))

    def set_rates(self, phase: Phase) -> None:
        """Set the learning rates, and the weight of the hidden-state loss, of the next step."""
        factor = learning_rate_factor((self.step - phase.begin) / (phase.end - phase.begin), self.config)
        for group in self.groups:
            rate = 0.0 if phase.frozen and group.latents else group.rate * factor
            if isinstance(group.settings["lr"], Tensor):
                group.settings["lr"].fill_(rate)
            else:
                group.settings["lr"] = rate
        self.hidden_weight.fill_(self.config.hidden * factor)

    def log(self, steps: int, begin: float, bar: tqdm) -> None:
        """Add an entry to the log, `steps` after the last; raise TrainingError if the loss is not a number."""
        loss = self.checked()  # waits for the GPU, so the time is taken after it
        self.losses.clear()
        seconds = time.perf_counter() - begin
        count = steps * self.config.step_tokens
        memory = torch.cuda.max_memory_allocated() if self.on_gpu else 0
        entry = {
            "step": self.step,
            "tokens": self.step * self.config.step_tokens,
            "loss": loss,
            "grad_norm": self.norm.item(),
            "lr": float(self.groups[0].settings["lr"]),
            "tokens_per_s": count / seconds,
            "memory_bytes": memory,
        }
        self.history.append(entry)
        if self.keeper is not None and self.rank == 0:
            self.keeper.log(entry)
        bar.set_postfix(loss=f"{loss:.3f}", memory=f"{memory / 2**30:.1f} GiB", refresh=False)
        bar.update(count)

    def checked(self) -> float:
        """Mean of the losses over steps and processes; raises TrainingError if it or the gradient is not finite."""
        if not self.losses:
            return 0.0
        mean = torch.stack(self.losses).mean()
        if self.world > 1:
            distributed.all_reduce(mean)
            mean /= self.world
        if not (math.isfinite(mean.item()) and math.isfinite(self.norm.item())):
            raise TrainingError(
                f"the loss is {mean.item()}, the gradient's norm {self.norm.item()} up to step {self.step}: lower the "
                "learning rates, or look at the data; the last saved state stays"
            )
        return mean.item()

    def keep(self, stop: bool) -> None:
        """Save the state if it is time, or if a signal says to stop."""
        wanted = stop or (self.keeper is not None and self.keeper.is_time())
        if self.world > 1:
            flags = torch.tensor([wanted, stop], dtype=torch.float32, device=self.device)
            distributed.all_reduce(flags, distributed.ReduceOp.MAX)
            wanted, stop = (bool(flag) for flag in flags.tolist())
        if wanted:
            self.checked()
            if self.keeper is not None:
                tensors = {name: whole(tensor) for name, tensor in self.state().items()}  # every process takes part
                if self.rank == 0:
                    self.keeper.save(self.step, tensors | {"losses": torch.tensor(self.losses)})
        if stop:
            kept = "its state is saved: the same command goes on" if self.keeper is not None else "no state was kept"
            raise TrainingStopped(f"training was told to stop after step {self.step}; {kept}")

    def restore(self) -> None:
        """Go on from the last state that was kept, if there is one."""
        found = self.keeper.last() if self.keeper is not None else None
        if found is not None:
            self.step, tensors, self.history = found
            self.losses = list(tensors.pop("losses").to(self.device))
            put(self.state(), tensors)
        if self.keeper is not None and self.rank == 0:
            self.keeper.begin(self.history)

    def logit_loss(self, tokens: Tensor, taps: "Taps | None") -> Tensor:
        """KL on the logits, plus the hidden-state loss."""
        with torch.no_grad():
            wanted = self.teacher(input_ids=tokens, use_cache=False).logits
        labels = next_tokens(tokens) if self.config.label_weight else None
        loss = KLLoss.apply(self.student.logits(tokens), wanted, self.kl_rows, labels, self.config.label_weight)
        if taps is not None:
            loss = loss + self.hidden_weight * taps.loss(self.hidden_loss, self.config.normalise)
        return loss

    def block_loss(self, tokens: Tensor, taps: "Taps | None") -> Tensor:
        """Every block's error on the teacher's own stream."""
        assert taps is not None
        with torch.no_grad():
            self.teacher(input_ids=tokens, use_cache=False)
        self.student.logits(tokens)
        return taps.loss(self.hidden_loss, self.config.normalise)

    @contextlib.contextmanager
    def tapped(self, forced: bool) -> Iterator[None]:
        """While active, `self.taps` records the blocks' outputs, if the loss needs them."""
        self.taps = None
        if forced or self.config.hidden:
            self.taps = Taps(blocks(self.student.model), blocks(self.teacher), forced)
        try:
            yield
        finally:
            if self.taps is not None:
                self.taps.remove()

    def prepared(self, loss_of: Callable) -> tuple[Callable[[], None], Callable[[], None]]:
        """The two halves of a step, up to the gradients and from them on; captured on a GPU."""
        at_once = (self.config.micro_batch or self.config.batch) * self.config.sequence  # tokens
        parts = self.tokens.split(max(1, at_once // self.tokens.shape[1]))

        def backward() -> None:
            total = torch.zeros((), device=self.device)
            for part in parts:
                loss = loss_of(part, self.taps) * (len(part) / len(self.tokens))
                loss.backward()
                total += loss.detach()
            self.loss.copy_(total)

        def update() -> None:
            masters = list(self.masters.values())
            norm = torch.nn.utils.clip_grad_norm_(masters, self.config.clip or math.inf, foreach=True)
            self.norm.copy_(whole(norm))
            self.update_masters()

        if self.capture:
            return self.captured(backward, update)

        def begin() -> None:
            self.forget_gradients()
            backward()

        return begin, update

    def captured(
        self, backward: Callable[[], None], update: Callable[[], None]
    ) -> tuple[Callable[[], None], Callable[[], None]]:
        """Both halves as replays of CUDA graphs; the state is as it was before."""
        before = {name: tensor.cpu() for name, tensor in self.state().items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(EAGER_STEPS):
                self.forget_gradients()
                backward()
                update()
        torch.cuda.current_stream().wait_stream(stream)
        self.forget_gradients()  # so that the gradients are made in the graph's own memory
        graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
        with torch.cuda.graph(graphs[0]):
            backward()
        with torch.cuda.graph(graphs[1], pool=graphs[0].pool()):
            update()
        put(self.state(), before)
        return graphs[0].replay, graphs[1].replay

    def average_gradients(self) -> None:
        """Mean of the gradients over the processes; FSDP has taken it already."""
        if self.world > 1 and isinstance(self.student, StackedStudent):
            for master in self.masters.values():
                if master.grad is not None:  # blocks that are trained by themselves leave the last norm alone
                    distributed.all_reduce(master.grad)
                    master.grad /= self.world


class Taps:
    """Hooks that record what every block writes, for the losses on hidden states.

    Parameters
    ----------
    student, teacher : lists of the models' blocks
    forced : bool
        Whether each of the student's blocks reads what the teacher's block before it wrote.
    """

    def __init__(self, student: list[nn.Module], teacher: list[nn.Module], forced: bool):
        self.student: list[Tensor] = []
        self.teacher: list[Tensor] = []
        self.handles = [
            block.register_forward_hook(self.record(self.student, block is student[0])) for block in student
        ]
        self.handles += [
            block.register_forward_hook(self.record(self.teacher, block is teacher[0])) for block in teacher
        ]
        if forced:
            for before, block in enumerate(student[1:]):
                self.handles.append(block.register_forward_pre_hook(self.replace(before), with_kwargs=True))

    def record(self, outputs: list[Tensor], is_first: bool) -> Callable:
        """A hook that appends a block's output; the first block begins a new list."""

        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if is_first:
                outputs.clear()
            outputs.append(output[0] if isinstance(output, tuple) else output)

        return hook

    def replace(self, before: int) -> Callable:
        """A hook that makes a block read the teacher's states."""

        def hook(module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            states = self.teacher[before]
            if arguments:
                return (states, *arguments[1:]), keywords
            return arguments, keywords | {"hidden_states": states}

        return hook

    def loss(self, hidden_loss: Callable[[Tensor, Tensor, bool], Tensor], normalise: bool) -> Tensor:
        """Hidden-state loss summed over blocks."""
        pairs = zip(self.student, self.teacher, strict=True)
        loss = torch.stack([hidden_loss(mine, wanted, normalise) for mine, wanted in pairs]).sum()
        self.student.clear()  # so that the step's graph can go once its gradients are there
        self.teacher.clear()
        return loss

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self.handles:
            handle.remove()


class Group(NamedTuple):
    """Masters that share a learning rate.

    Attributes
    ----------
    settings : dict
        The optimiser's own group of parameters, whose "lr" is set before each step.
    rate : float
        The highest learning rate.
    latents : bool
        Whether these are latents, which a phase may freeze.
    """

    settings: dict[str, Any]
    rate: float
    latents: bool


def optimizers(
    masters: Masters, config: TrainConfig, device: torch.device
) -> tuple[list[torch.optim.Optimizer], list[Group]]:
    """Make the optimisers of all masters, and list their groups: latents, scales, others."""
    captured = device.type == "cuda"
    rates = (config.lr_latents, config.lr_scales, config.lr_others)
    found = [
        ({"params": list(group.values()), "lr": torch.tensor(rate, device=device) if captured else rate}, rate)
        for group, rate in zip(masters, rates, strict=True)
        if group
    ]
    count = 1 if config.optimizer == "muon" else 0
    made: list[torch.optim.Optimizer] = [Muon([group for group, _ in found[:count]])] if count else []
    if found[count:]:
        settings = {"betas": config.betas, "weight_decay": 0.0, "fused": True, "capturable": captured}
        made.append(torch.optim.AdamW([group for group, _ in found[count:]], **settings))
    groups = [group for optimizer in made for group in optimizer.param_groups]
    return made, [Group(group, rate, at == 0) for at, (group, (_, rate)) in enumerate(zip(groups, found, strict=True))]


def next_tokens(tokens: Tensor) -> Tensor:
    """The token that follows each position, (batch * sequence,); -1 after the last of a sequence."""
    return functional.pad(tokens[:, 1:], (0, 1), value=-1).flatten()


def put(targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy values into tensors of the same names, which may be divided over processes."""
    for name, target in targets.items():
        value = values[name].to(target.device)
        if hasattr(target, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, target.device_mesh, target.placements)  # type: ignore[attr-defined]
        target.copy_(value)


def schedules(lengths: Sequence[int], weights: Sequence[float] | None, config: TrainConfig) -> list[Tensor]:
    """Draw the `schedule` of every phase, (steps, sequences in a step); phases of equal sequences share epochs."""
    drawn = []
    for sequence, group in groupby(phases(config), key=lambda phase: phase.sequence):
        steps = [phase.last - phase.first for phase in group]
        size = {"tokens": sum(steps) * config.step_tokens, "batch": config.step_tokens // sequence}
        drawn += schedule(lengths, weights, replace(config, sequence=sequence, **size)).split(steps)
    return drawn


def schedule(lengths: Sequence[int], weights: Sequence[float] | None, config: TrainConfig) -> Tensor:
    """Where in the texts, laid end to end, each sequence of each step begins.

    Every text is cut into sequences that do not overlap, from an offset that differs from epoch to epoch, and they
    are read in random order. Which text comes next is drawn in proportion to the weights.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each text.
    weights : sequence of float, optional
        By default the lengths.
    config : TrainConfig

    Returns
    -------
    (steps, batch) int64 tensor.

    Raises
    ------
    ValueError
        If there are no weights that can be drawn from.
    """
    weights = list(lengths if weights is None else weights)
    if len(weights) != len(lengths) or not all(0 <= each < math.inf for each in weights) or not sum(weights):
        raise ValueError(f"weights must be one per text, not negative, and not all zero: {weights} for {len(lengths)}")
    generator = torch.Generator().manual_seed(config.seed)
    count = config.steps * config.batch
    source = torch.multinomial(torch.tensor(weights, dtype=torch.float64), count, replacement=True, generator=generator)
    starts = torch.empty(count, dtype=torch.int64)
    for at, length in enumerate(lengths):
        here = source == at
        first = sum(lengths[:at])
        starts[here] = first + epochs(length, config.sequence, int(here.sum()), generator)
    return starts.view(config.steps, config.batch)


def epochs(length: int, sequence: int, count: int, generator: torch.Generator) -> Tensor:
    """Starts of `count` sequences in a text, epoch after epoch."""
    parts, have = [torch.empty(0, dtype=torch.int64)], 0
    while have < count:
        offset = int(torch.randint(min(sequence, length - sequence + 1), (), generator=generator))
        windows = (length - offset) // sequence
        parts.append(offset + sequence * torch.randperm(windows, generator=generator))
        have += windows
    return torch.cat(parts)[:count]


def learning_rate_factor(progress: float, config: TrainConfig) -> float:
    """What the highest learning rates are multiplied with: a linear warm-up, then a cosine.

    Examples
    --------
    >>> [round(learning_rate_factor(x, TrainConfig(warmup=0.1)), 3) for x in (0.05, 0.1, 0.55, 1.0)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if progress < config.warmup:
        return progress / config.warmup
    fall = (progress - config.warmup) / (1 - config.warmup)
    return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * fall))


def longest(config: TrainConfig) -> int:
    """Tokens in the longest sequence of a training."""
    return max(phase.sequence for phase in phases(config))


def process() -> tuple[int, int]:
    """Number of the process, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@contextlib.contextmanager
def joined_processes(device: str | None = None) -> Iterator[str]:
    """The device to train on; started by torchrun, the processes are joined while this is active.

    Parameters
    ----------
    device : str, optional
        "cpu" or "cuda"; by default cuda where there is one. Under torchrun, cuda means the GPU of the local rank.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device} was asked for, but torch sees no GPU")
    if "RANK" not in os.environ:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """While active, torch uses algorithms that give the same bits each time."""
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
    """While active, the blocks of both models and the folding run compiled; blocks of one shape share their code."""
    if not wanted or not isinstance(student, StackedStudent):
        yield
        return
    parts = [*blocks(student.model), *blocks(teacher)]
    student.fold = torch.compile(fold, dynamic=True)
    for block in parts:  # its forward alone, so that hooks stay outside of the compiled code
        block.forward = torch.compile(block.forward, dynamic=False)  # type: ignore[method-assign]
    try:
        # floats are constants: torch 2.11 cannot trace a derivative that reads a global one as a symbol
        settings = {"recompile_limit": RECOMPILE_LIMIT, "specialize_float": True}
        with torch._dynamo.config.patch(settings):  # type: ignore[attr-defined]
            yield
    finally:
        student.fold = fold
        for block in parts:
            del block.forward


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """While active, SIGTERM and SIGINT add to a list instead of ending the process, so that the state can be saved."""
    received: list[int] = []
    before = {}

    def note(number: int, frame: Any) -> None:
        if received:  # the second one means it
            raise KeyboardInterrupt
        received.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError):  # only the main thread may
            before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_config(config: TrainConfig, world: int) -> None:
    """Raise ValueError unless the settings make sense."""
    named_rule(config.rule)
    check_trainable(config.train)
    smallest = dict.fromkeys(("tokens", "sequence", "batch", "long_sequence"), 1)
    smallest |= dict.fromkeys(("block_tokens", "long_tokens", "frozen_tokens", "seed"), 0)
    for key, low in smallest.items():
        check_number(key, getattr(config, key), low=low, below=2**63, whole=True)
    if config.micro_batch is not None:
        check_number("micro_batch", config.micro_batch, low=1, whole=True)
    if config.batch % world:
        raise ValueError(f"a step's {config.batch} sequences cannot be divided evenly among {world} processes")
    at_once = config.batch // world if config.micro_batch is None else config.micro_batch
    if at_once < 1 or (config.batch // world) % at_once:
        raise ValueError(
            f"a process's {config.batch // world} sequences a step cannot be divided evenly into parts of {at_once} "
            "(micro_batch)"
        )
    if config.long_tokens and config.batch // world * config.sequence % config.long_sequence:
        raise ValueError(
            f"a process's {config.batch // world} sequences of {config.sequence} tokens a step cannot be read as "
            f"sequences of {config.long_sequence} (long_sequence): choose sizes that divide"
        )
    if config.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {config.optimizer!r}")
    check_number("warmup", config.warmup, low=0, below=1)
    check_number("label_weight", config.label_weight, low=0, high=1)
    for key in ("lr_latents", "lr_scales", "lr_others", "hidden", "clip", "final", "latent_scale"):
        check_number(key, getattr(config, key), low=0)
    for beta in config.betas:
        check_number("betas", beta, low=0, below=1)


def check_models(model: nn.Module, teacher: nn.Module) -> None:
    """Raise ValueError unless the student is quantised and teacher and student share vocabulary and sizes."""
    if not littlebit_layers(model):
        raise ValueError("the model has no LittleBit layer that can be trained; call quantize_ first")
    if littlebit_layers(teacher):
        raise ValueError("the teacher is quantised; pass the full-precision model")
    for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        mine, theirs = (getattr(each.config, key, None) for each in (model, teacher))
        if mine != theirs:
            raise ValueError(f"teacher and student do not fit each other: {key} is {theirs} and {mine}")


def checked_text(text: Tensor, model: nn.Module, sequence: int) -> Tensor:
    """Turn a training text into (n,) tokens, of which the model can read `sequence` at once.

    Raises
    ------
    ValueError
        If it is too short or has no such tokens, or the model has fewer positions.
    """
    check_positions(sequence, positions_of(model), f"a sequence of {sequence} tokens")
    return flat_tokens(text, model, least=sequence)
