"""Train a whole language model by quantization-aware training (QAT): a LittleBit student learns its teacher's logits.

`step` below is the training step (LittleBit, arXiv 2506.13771, the section on quantization-aware training). `train_`
prepares the models and the data. `Trainer` runs the loop: phases, learning rates, log and saved states.

On a GPU, the models' blocks are compiled, and the step is replayed from CUDA graphs (see `execution`). A run that is
killed at any moment resumes from its last state, and ends with the same bits (see `resume`).
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from ...reference._renamed import renamed_keywords
from .._checks import check_number
from .._progress import tqdm
from ..distill import KLLoss, hidden_loss, kl_rows
from ..files.digests import tensors_digest
from ..models.blocks import decoder_blocks
from ..models.experts import has_experts
from ..models.wrappers import to_change, with_adapters_inside
from .causal_attention import causal_attention, is_plainly_causal
from .config import TrainConfig, check_config
from .execution import GraphRecorder, compiled, deterministic, record_step, zero_gradients
from .hidden_states import HiddenStateHooks
from .optimizers import make_optimizers
from .phases import learning_rate_factor, longest_sequence, phases
from .processes import all_reduce_mean, rank_and_world_size, stop_signals
from .resume import Checkpointer
from .student import (
    ShardedStudent,
    StackedStudent,
    check_models,
    copy_state,
    full_tensor,
    scale_latents_,
    shard_,
)
from .windows import checked_text, phase_window_starts


class TrainingError(RuntimeError):
    """Report that training cannot continue. The last saved state is kept."""


class TrainingStopped(RuntimeError):  # noqa: N818 (not an error)
    """Report that training stopped after SIGTERM or SIGINT, with its state saved."""


def step(trainer: "Trainer", tokens: Tensor, recorder: GraphRecorder | None = None) -> tuple[Tensor, Tensor]:
    """Train the student by one step: forward, losses, backward, all-reduce, clip, optimizer.

    loss = KL(teacher || student) + hidden_weight * sum over blocks of the hidden-state loss

    Where blocks are trained alone, the loss is the sum over blocks, and each block reads the teacher's hidden states.

    Parameters
    ----------
    trainer : Trainer
        Holds the models, the float32 master weights and their optimizers.
    tokens : (sequences, sequence) int64 tensor
        This process's part of the step.
    recorder : GraphRecorder, optional
        Captures this call in CUDA graphs.

    Returns
    -------
    () loss of the step in nats, and () norm of the gradients before clipping.
    """
    config, masters = trainer.config, list(trainer.masters.values())
    zero_gradients(masters)
    step_loss = torch.zeros((), device=tokens.device)
    for part in tokens.split(trainer.micro_batch()):  # (micro-batch, sequence)
        # Forward. Autograd reaches the masters through the student's folded weights.
        with torch.no_grad():
            teacher_logits = trainer.teacher(input_ids=part, use_cache=False).logits
        student_logits = trainer.student.logits(part)  # (micro-batch, sequence, vocabulary)
        # Losses.
        if trainer.phase.blocks:
            loss = trainer.hidden_state_loss()
        else:
            labels = next_tokens(part) if config.label_weight else None
            loss = KLLoss.apply(student_logits, teacher_logits, trainer.kl_rows, labels, config.label_weight)
            if trainer.hooks is not None:
                loss = loss + trainer.hidden_weight * trainer.hidden_state_loss()
        del student_logits, teacher_logits  # The backward pass needs only their difference, so this frees memory.
        # Backward. The gradients of all micro-batches accumulate in the masters.
        loss = loss * (len(part) / len(tokens))
        loss.backward()
        step_loss += loss.detach()
    # All-reduce: the mean of the gradients over all processes.
    trainer.average_gradients(recorder)
    # Clip the norm of all gradients together.
    norm = trainer.gradient_norm()
    torch.nn.utils.clip_grads_with_norm_(masters, config.max_grad_norm or math.inf, norm, foreach=True)
    # Optimizer.
    for optimizer in trainer.optimizers:
        optimizer.step()
    return step_loss, norm


def next_tokens(tokens: Tensor) -> Tensor:
    """List the token that follows each position, (batch * sequence,); -1 after the last one of a sequence."""
    return functional.pad(tokens[:, 1:], (0, 1), value=-1).flatten()


@renamed_keywords(keeper="checkpointer")
def train_(
    model: nn.Module,
    teacher: nn.Module,
    tokens: Tensor | Sequence[Tensor],
    config: TrainConfig | None = None,
    weights: Sequence[float] | None = None,
    checkpointer: Checkpointer | None = None,
    dtype: torch.dtype | None = None,
    compile: bool = True,
    shard: bool = False,
    recompute: bool = False,
    log_steps: int = 20,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train a quantized model on its teacher's logits, in place.

    Under torchrun (with torch.distributed initialized), each process trains on its part of every step.

    Parameters
    ----------
    model : transformers causal language model after `quantize_`, float32
    teacher : the model before `quantize_`, on the same device
        Its parameters are cast to `dtype`, in place.
    tokens : (n,) or (1, n) integer tensor, or a sequence of them
        Training texts.
    config : TrainConfig, optional
    weights : sequence of float, optional
        Relative frequency of each text; by default proportional to its length.
    checkpointer : Checkpointer, optional
        Saves the state and the log in a folder. If the folder holds a state of this run, training resumes from it.
    dtype : torch.dtype, optional
        Dtype that both models compute in; by default bfloat16 on a GPU and float32 on a CPU.
    compile : bool
        Whether to compile the models' blocks, on a GPU.
    shard : bool
        Whether to shard masters and teacher over the processes (FSDP2), for large models. Under torchrun with one
        process, each block's weights are folded only while the block runs, which saves memory too.
    recompute : bool
        Whether to keep only the inputs of the blocks for the backward pass, and compute each block again there
        (activation checkpointing). The losses stay the same. Needs `shard`.
    log_steps : int
        Steps between entries of the log.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    The log: a dict for every `log_steps` steps with step, tokens, loss (nats, mean over those steps), grad_norm, lr (of
    the latents), tokens_per_s, memory_bytes (peak of GPU memory; 0 on a CPU).

    Raises
    ------
    ValueError
        If the model is not quantized or has PEFT adapters, teacher and student differ in shape, a text is too short, a
        setting is out of range, or the folder holds the state of another run.
    TrainingError
        If the loss is not finite or memory runs out. The last saved state is kept.
    TrainingStopped
        After SIGTERM or SIGINT, once the state is saved.
    OSError
        If another process trains with the checkpointer's folder.
    """
    config = config or TrainConfig()
    rank, world_size = rank_and_world_size()
    check_config(config, world_size)
    check_number("log_steps", log_steps, low=1, whole=True)
    check_sharding(config, shard, recompute)
    model, teacher = to_change(model, "train_"), with_adapters_inside(teacher)
    check_models(model, teacher)
    longest = longest_sequence(config)
    texts = [checked_text(text, model, longest) for text in ([tokens] if isinstance(tokens, Tensor) else tokens)]
    starts = phase_window_starts([len(text) for text in texts], weights, config)
    corpus = torch.cat([text.to(torch.int32) for text in texts])
    device = next(model.parameters()).device
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if checkpointer is not None:
        run = {"dtype": str(dtype), "device": device.type, "world": world_size, "shard": shard}
        checkpointer.check_run(asdict(config) | run | {"data": tensors_digest(corpus, *starts)})
    capture = device.type == "cuda" and not shard and is_plainly_causal(model, longest)
    capture = capture and not has_experts(model)  # The text decides which experts run, so no graph fits every step.
    for parameter in model.parameters() if world_size > 1 else ():  # Rounding may differ between processes.
        distributed.broadcast(parameter.data, 0)
    try:
        student = make_student(model, teacher, config, dtype, shard, recompute)
        with prepared(student, teacher, checkpointer if rank == 0 else None, capture, compile):
            own_starts = [part[:, rank::world_size] for part in starts]
            trainer = Trainer(student, teacher, corpus.to(device), own_starts, config, checkpointer, capture)
            if compile and capture:
                trainer.kl_rows = torch.compile(kl_rows, dynamic=False)
                trainer.block_loss = torch.compile(hidden_loss, dynamic=False)
            log = trainer.run(log_steps, progress and rank == 0)
    except torch.OutOfMemoryError as error:
        sequences = config.micro_batch or config.batch_size // world_size
        raise TrainingError(
            f"out of memory with {sequences} sequences of {config.sequence_length} tokens at once: lower micro_batch, "
            f"or shard the masters over several GPUs ({error})"
        ) from error
    student.finish()
    return log


def make_student(
    model: nn.Module, teacher: nn.Module, config: TrainConfig, dtype: torch.dtype, shard: bool, recompute: bool = False
) -> StackedStudent | ShardedStudent:
    """Make the student, and cast the teacher to the compute dtype; shard both if asked to."""
    teacher.to(dtype).requires_grad_(False)  # type: ignore[call-arg]
    if config.latent_scale:
        scale_latents_(model, config.latent_scale)
    if not shard:
        return StackedStudent(model, config.rule, config.train, dtype)
    shard_(teacher, dtype)
    return ShardedStudent(model, config.rule, config.train, dtype, recompute)


@contextlib.contextmanager
def prepared(
    student: StackedStudent | ShardedStudent,
    teacher: nn.Module,
    checkpointer: Checkpointer | None,
    capture: bool,
    compile: bool,
) -> Iterator[None]:
    """Lock the folder and change torch's settings and the models for training, while the context is active."""
    with contextlib.ExitStack() as stack:
        if checkpointer is not None:
            stack.enter_context(checkpointer.exclusive())
        stack.enter_context(deterministic())
        if capture:
            for model in (student.model, teacher):
                stack.enter_context(causal_attention(model))
        stack.enter_context(compiled(compile and capture, student, teacher))
        yield


class Trainer:
    """Run the training loop: phases and steps, learning rates, log and saved states.

    Parameters
    ----------
    student : StackedStudent or ShardedStudent
    teacher : transformers causal language model
    corpus : (n,) int32 tensor
        Tokens of all texts, laid end to end.
    starts : list of (steps, sequences) int64 tensors
        For each phase, where the sequences of this process begin in the corpus.
    config : TrainConfig
    checkpointer : Checkpointer or None
    capture : bool
        Whether to replay the step from CUDA graphs.
    """

    def __init__(
        self,
        student: StackedStudent | ShardedStudent,
        teacher: nn.Module,
        corpus: Tensor,
        starts: list[Tensor],
        config: TrainConfig,
        checkpointer: Checkpointer | None,
        capture: bool,
    ):
        self.student, self.teacher, self.corpus, self.config = student, teacher, corpus, config
        self.checkpointer, self.capture = checkpointer, capture
        self.device = corpus.device
        self.rank, self.world_size = rank_and_world_size()
        self.phases = phases(config)
        self.phase = self.phases[0]
        self.starts = [part.to(self.device) for part in starts]
        self.hooks: HiddenStateHooks | None = None
        self.hidden_weight = torch.zeros((), device=self.device)  # A tensor, because CUDA graphs read it from memory.
        self.norm = torch.zeros((), device=self.device)
        self.kl_rows: Callable[..., tuple[Tensor, Tensor]] = kl_rows
        self.block_loss: Callable[[Tensor, Tensor, bool], Tensor] = hidden_loss
        self.history: list[dict[str, float]] = []
        self.step = 0
        self.losses: list[Tensor] = []  # losses of the steps since the last entry of the log
        masters = student.masters()
        self.masters = masters.named()
        self.optimizers, self.groups = make_optimizers(masters, config, self.device)
        self.allocate_optimizer_state()

    def allocate_optimizer_state(self) -> None:
        """Let the optimizers allocate their state by a step with zero gradients, and set it to zero."""
        for master in self.masters.values():
            master.grad = torch.zeros_like(master)
        for optimizer in self.optimizers:
            optimizer.step()
        zero_gradients(self.masters.values())
        self.reset_moments()

    def reset_moments(self) -> None:
        """Set the optimizers' moments and step counts to zero."""
        for tensor in self.optimizer_state().values():
            tensor.zero_()

    def optimizer_state(self) -> dict[str, Tensor]:
        """Map names of master weights, with the kind of moment, to the optimizers' moments and step counts."""
        return {
            f"{name}.{key}": tensor
            for name, master in self.masters.items()
            for optimizer in self.optimizers
            for key, tensor in optimizer.state.get(master, {}).items()
        }

    def state(self) -> dict[str, Tensor]:
        """Map names to all tensors that a step changes."""
        tensors = {name: master.detach() for name, master in self.masters.items()} | self.optimizer_state()
        return self.student.state(tensors) if isinstance(self.student, ShardedStudent) else tensors

    def batch(self, step: int) -> Tensor:
        """Gather the tokens of a step, (sequences, sequence) int64."""
        phase, starts = next(pair for pair in zip(self.phases, self.starts, strict=True) if step < pair[0].last)
        offsets = torch.arange(phase.sequence, device=self.device)
        return self.corpus[starts[step - phase.first][:, None] + offsets].long()

    def micro_batch(self) -> int:
        """Count the sequences to compute at once, so that long sequences take as many tokens as short ones."""
        tokens = (self.config.micro_batch or self.config.batch_size) * self.config.sequence_length
        return max(1, tokens // self.phase.sequence)

    def hidden_state_loss(self) -> Tensor:
        """Sum the hidden-state loss over the blocks of the last forward pass."""
        assert self.hooks is not None
        return self.hooks.loss(self.block_loss, self.config.normalize)

    def average_gradients(self, recorder: GraphRecorder | None) -> None:
        """Average the gradients over the processes, outside of CUDA graphs; FSDP has done so in its backward pass."""
        if isinstance(self.student, ShardedStudent):
            return self.student.take_gradients()
        if self.world_size == 1:
            return
        all_reduce = partial(all_reduce_mean, list(self.masters.values()), self.world_size)
        if recorder is None:
            all_reduce()
        else:
            recorder.run_eagerly(all_reduce)

    def gradient_norm(self) -> Tensor:
        """Compute the norm of all gradients together, of all processes' shards if there are several, ()."""
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if self.world_size > 1 and isinstance(self.student, ShardedStudent):
            square = norm.square()
            distributed.all_reduce(square)
            norm = square.sqrt()
        return norm

    def run(self, log_steps: int, progress: bool) -> list[dict[str, float]]:
        """Train all steps that are not done yet, and return the log."""
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
                        self.reset_moments()
                    self.phase = phase
                    with self.hooked():
                        self.run_phase(log_steps, stop, bar)
        return self.history

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Record the hidden states of both models while the context is active, if the loss needs them."""
        blocks = self.phase.blocks
        if blocks or self.config.hidden_loss_weight:
            pair = decoder_blocks(self.student.model), decoder_blocks(self.teacher)
            self.hooks = HiddenStateHooks(*pair, teacher_forcing=blocks)
        try:
            yield
        finally:
            if self.hooks is not None:
                self.hooks.remove()
            self.hooks = None

    def run_phase(self, log_steps: int, stop: list[int], bar: tqdm) -> None:
        """Train the steps of the phase that are not done yet."""
        tokens = self.batch(self.step)  # All steps read this memory, because CUDA graphs do.
        train_step: Callable[[], tuple[Tensor, Tensor]] = partial(step, self, tokens)
        if self.capture:
            train_step = record_step(partial(step, self, tokens), self.masters.values(), self.state())
        begin, done = time.perf_counter(), self.step
        while self.step < self.phase.last:
            tokens.copy_(self.batch(self.step))
            self.set_rates()
            loss, self.norm = train_step()
            self.losses.append(loss.clone())
            self.step += 1
            logging = self.step % log_steps == 0 or self.step == self.phase.last
            if logging:
                self.log(self.step - done, begin, bar)
                begin, done = time.perf_counter(), self.step
            if self.world_size == 1 or logging:
                self.checkpoint(bool(stop))

    def set_rates(self) -> None:
        """Set the learning rates and the weight of the hidden-state loss for the next step."""
        begin, end = self.phase.begin, self.phase.end
        factor = learning_rate_factor((self.step - begin) / (end - begin), self.config)
        for group in self.groups:
            rate = 0.0 if self.phase.frozen and group.latents else group.peak_lr * factor
            if isinstance(group.settings["lr"], Tensor):
                group.settings["lr"].fill_(rate)
            else:
                group.settings["lr"] = rate
        self.hidden_weight.fill_(self.config.hidden_loss_weight * factor)

    def log(self, steps: int, begin: float, bar: tqdm) -> None:
        """Append an entry about the last `steps` steps, which began at time `begin`, to the log."""
        loss = self.mean_loss()  # This waits for the GPU, so the time is read after it.
        self.losses.clear()
        seconds = time.perf_counter() - begin
        count = steps * self.config.step_tokens
        memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
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
        if self.checkpointer is not None and self.rank == 0:
            self.checkpointer.append_log(entry)
        bar.set_postfix(loss=f"{loss:.3f}", memory=f"{memory / 2**30:.1f} GiB", refresh=False)
        bar.update(count)

    def mean_loss(self) -> float:
        """Average the losses since the last entry of the log, over steps and processes.

        Raises
        ------
        TrainingError
            If the mean or the last gradient norm is not finite.
        """
        if not self.losses:
            return 0.0
        mean = torch.stack(self.losses).mean()
        if self.world_size > 1:
            distributed.all_reduce(mean)
            mean /= self.world_size
        if not (math.isfinite(mean.item()) and math.isfinite(self.norm.item())):
            raise TrainingError(
                f"loss and gradient norm must be finite, got {mean.item()} and {self.norm.item()} up to step "
                f"{self.step}: lower the learning rates, or check the data; the last saved state is kept"
            )
        return mean.item()

    def checkpoint(self, stop: bool) -> None:
        """Save the state if that is due; after a stop signal, save it and raise TrainingStopped."""
        due = stop or (self.checkpointer is not None and self.checkpointer.is_due())
        if self.world_size > 1:
            flags = torch.tensor([due, stop], dtype=torch.float32, device=self.device)
            distributed.all_reduce(flags, distributed.ReduceOp.MAX)
            due, stop = (bool(flag) for flag in flags.tolist())
        if due:
            self.mean_loss()  # A state that is not finite must not be saved.
            if self.checkpointer is not None:
                tensors = {}
                for name, tensor in self.state().items():
                    whole = full_tensor(tensor)  # All processes gather; one whole tensor at a time is on the GPU.
                    if self.rank == 0:
                        tensors[name] = whole.cpu()
                if self.rank == 0:
                    self.checkpointer.save(self.step, tensors | {"losses": torch.tensor(self.losses)})
        if stop:
            resumable = self.checkpointer is not None
            saved = "its state is saved: run the same command to resume" if resumable else "no state was saved"
            raise TrainingStopped(f"training was stopped after step {self.step}; {saved}")

    def restore(self) -> None:
        """Load the newest saved state, if there is one."""
        if self.checkpointer is None:
            return
        found = self.checkpointer.load()
        if found is not None:
            self.step, tensors, self.history = found
            self.losses = list(tensors.pop("losses").to(self.device))
            copy_state(self.state(), tensors)
        if self.rank == 0:
            self.checkpointer.start_log(self.history)


def check_sharding(config: TrainConfig, shard: bool, recompute: bool) -> None:
    """Raise ValueError if the masters are to be sharded but cannot be, or blocks recomputed without that."""
    if recompute and not shard:
        raise ValueError("recompute=True needs shard=True, with which each layer folds its own weights")
    if shard and not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError("shard=True needs several processes: start them with torchrun")
    if shard and config.optimizer == "muon":
        raise ValueError("shard=True needs optimizer='adam', because muon must see whole latents, got 'muon'")
