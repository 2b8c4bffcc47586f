"""Test that a run that was stopped at any moment resumes, and ends with the same bits as one that was not."""

import copy
import errno
import json
import os
import random
import signal
import time

import littlebit.fast as lb
import pytest
import torch
import workers
from compare import assert_same
from littlebit.fast.files.digests import json_digest, tensors_digest
from littlebit.fast.training import resume
from littlebit.fast.training.config import RENAMED_SETTINGS
from littlebit.fast.training.trainer import Trainer
from training_runs import one_thread, teacher_and_student  # noqa: F401 (a fixture of this module)

SETTINGS = {"total_tokens": 12 * 64, "sequence_length": 16, "batch_size": 4, "warmup": 0.1, "lr_latents": 0.01}
TIMES = ("tokens_per_s", "memory_bytes")


@pytest.fixture(scope="module")
def models(loud_llama):
    return teacher_and_student(loud_llama)


TEXT = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(0))


def train(models, folder=None, minutes=0.0, run=None, log_steps=5, **changes):
    """Train, and return the trained student and the log."""
    teacher, student = copy.deepcopy(models)
    checkpointer = None if folder is None else lb.Checkpointer(folder, minutes, run)
    config = lb.TrainConfig(**(SETTINGS | changes))
    log = lb.train_(student, teacher, TEXT, config, checkpointer=checkpointer, log_steps=log_steps, progress=False)
    return student, log


@pytest.fixture(scope="module")
def whole(models):
    return train(models)


def timeless(log):
    """Remove the entries that differ from run to run from a log."""
    return [{key: value for key, value in entry.items() if key not in TIMES} for entry in log]


def assert_same_run(actual, expected):
    (student, log), (wanted, wanted_log) = actual, expected
    for mine, theirs in zip(student.parameters(), wanted.parameters(), strict=True):
        assert_same(mine, theirs)
    assert timeless(log) == timeless(wanted_log)


class StopError(Exception):
    """End a run in these tests."""


@pytest.fixture
def stop_before(monkeypatch):
    """Make the next run end, as if its process was killed, before it reads the tokens of a step."""

    def stop(last):
        real = Trainer.batch

        def batch(self, step):
            if step == last and self.step == last:
                monkeypatch.setattr(Trainer, "batch", real)
                raise StopError
            return real(self, step)

        monkeypatch.setattr(Trainer, "batch", batch)

    return stop


@pytest.mark.parametrize("last", [1, 5, 7, 11])
def test_run_goes_on_with_the_same_bits(models, whole, tmp_path, stop_before, last):
    """Also between entries of the log, each of which is a mean over five steps."""
    stop_before(last)
    with pytest.raises(StopError):
        train(models, tmp_path)
    assert lb.Checkpointer(tmp_path).states()[0].name == f"step-{last}"
    assert_same_run(train(models, tmp_path), whole)
    assert timeless(map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())) == timeless(whole[1])


def test_run_goes_on_within_and_after_the_part_block_by_block(models, tmp_path, stop_before):
    changes = {"block_tokens": 4 * 64, "hidden_loss_weight": 1.0}
    expected = train(models, **changes)
    for last in (3, 4, 6):
        stop_before(last)
        with pytest.raises(StopError):
            train(models, tmp_path, **changes)
    assert_same_run(train(models, tmp_path, **changes), expected)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_run_goes_on_in_every_phase(models, tmp_path, stop_before, optimizer):
    """Stopped inside of and between blocks, short sequences, long sequences, and frozen signs."""
    changes = {"optimizer": optimizer, "block_tokens": 2 * 64, "long_tokens": 6 * 64, "frozen_tokens": 3 * 64}
    changes |= {"long_sequence": 32, "label_weight": 0.25, "latent_scale": 0.5}
    expected = train(models, **changes)
    for last in (1, 2, 5, 6, 8, 9, 11):
        stop_before(last)
        with pytest.raises(StopError):
            train(models, tmp_path, **changes)
    assert_same_run(train(models, tmp_path, **changes), expected)


def test_run_that_has_ended_only_gives_its_result(models, whole, tmp_path):
    train(models, tmp_path)
    assert_same_run(train(models, tmp_path), whole)


def test_checkpointer_keeps_the_newest_states_and_nothing_half_written(models, tmp_path):
    (tmp_path / ".step-3-abc").mkdir(parents=True)  # of a process that was killed while it saved
    train(models, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"log.jsonl", *(f"step-{12 - at}" for at in range(resume.KEPT_STATES))}


def test_checkpointer_saves_when_it_is_time(models, tmp_path):
    train(models, tmp_path, minutes=60.0)
    assert lb.Checkpointer(tmp_path).states() == []


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path / "state.safetensors", 1000),
        lambda path: flip(path / "state.safetensors", -1),
        lambda path: flip(path / "state.safetensors", 20),
        lambda path: (path / "state.safetensors").unlink(),
        lambda path: (path / "run.json").unlink(),
        lambda path: (path / "run.json").write_text("[]"),
        lambda path: (path / "run.json").write_bytes(b"\xff{"),
        lambda path: flip(path / "run.json", (path / "run.json").read_bytes().index(b'"step": ') + 8),
        lambda path: flip(path / "run.json", (path / "run.json").read_bytes().index(b'"batch_size": ') + 14),
    ],
)
def test_damaged_state_is_passed_over_for_the_one_before(models, whole, tmp_path, stop_before, damage):
    stop_before(8)
    with pytest.raises(StopError):
        train(models, tmp_path)
    damage(tmp_path / "step-8")
    with pytest.warns(UserWarning, match="step-8 is corrupt"):
        actual = train(models, tmp_path)
    assert_same_run(actual, whole)


def test_run_begins_anew_if_every_state_is_damaged(models, whole, tmp_path, stop_before):
    stop_before(2)
    with pytest.raises(StopError):
        train(models, tmp_path)
    for path in lb.Checkpointer(tmp_path).states():
        flip(path / "state.safetensors", -1)
    with pytest.warns(UserWarning, match="corrupt") as caught:
        actual = train(models, tmp_path)
    assert len(caught) == 2
    assert_same_run(actual, whole)


def test_log_cut_off_in_a_line_is_repaired(models, whole, tmp_path, stop_before):
    stop_before(7)
    with pytest.raises(StopError):
        train(models, tmp_path)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    assert_same_run(train(models, tmp_path), whole)


def test_log_forgets_what_will_be_done_again(models, whole, tmp_path, stop_before):
    """The fifth step is in the log, but its state is gone."""
    stop_before(5)
    with pytest.raises(StopError):
        train(models, tmp_path)
    flip(tmp_path / "step-5" / "state.safetensors", -1)
    with pytest.warns(UserWarning, match="step-5 is corrupt"):
        assert_same_run(train(models, tmp_path), whole)
    assert timeless(map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())) == timeless(whole[1])


def test_full_disk_warns_and_keeps_the_older_state(models, whole, tmp_path, monkeypatch, stop_before):
    real = resume.save_file

    def full(tensors, path):
        if "step-6" in str(path) or "step-7" in str(path):
            real(tensors, path)
            os.truncate(path, 100)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(resume, "save_file", full)
    stop_before(7)
    with pytest.warns(UserWarning, match=r"step [67] was not saved.*No space left") as caught, pytest.raises(StopError):
        train(models, tmp_path)
    assert len(caught) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "step-4", "step-5"]
    monkeypatch.setattr(resume, "save_file", real)
    assert_same_run(train(models, tmp_path), whole)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"lr_latents": 0.02, "seed": 3}, "data, lr_latents, seed"),
        ({"total_tokens": 13 * 64}, "data, total_tokens"),
        ({"run": {"model": "another"}}, "model"),
    ],
)
def test_state_of_another_run_is_refused_and_stays(models, tmp_path, stop_before, changes, names):
    stop_before(2)
    with pytest.raises(StopError):
        train(models, tmp_path, run={"model": "this"})
    with pytest.raises(ValueError, match=f"the state of another run, which differs in {names}: give the same"):
        train(models, tmp_path, **({"run": {"model": "this"}} | changes))
    assert (tmp_path / "step-2").exists()


def test_state_that_names_settings_as_they_once_were_is_resumed(models, whole, tmp_path, stop_before):
    stop_before(3)
    with pytest.raises(StopError):
        train(models, tmp_path)
    old_names = {new: old for old, new in RENAMED_SETTINGS.items()}
    for path in tmp_path.glob("step-*/run.json"):
        description = json.loads(path.read_text())
        del description["check"]
        description["run"] = {old_names.get(name, name): value for name, value in description["run"].items()}
        assert {"tokens", "sequence", "batch", "final", "clip", "hidden", "normalise"} <= description["run"].keys()
        path.write_text(json.dumps(description | {"check": json_digest(description)}))
    with pytest.raises(ValueError, match="which differs in data, seed:"):
        train(models, tmp_path, seed=3, log_steps=5)
    assert_same_run(train(models, tmp_path), whole)


def test_state_of_another_dtype_is_refused(models, tmp_path, stop_before):
    stop_before(2)
    with pytest.raises(StopError):
        train(models, tmp_path)
    teacher, student = copy.deepcopy(models)
    checkpointer, config = lb.Checkpointer(tmp_path, 0.0), lb.TrainConfig(**SETTINGS)
    with pytest.raises(ValueError, match="which differs in dtype:"):
        lb.train_(student, teacher, TEXT, config, checkpointer=checkpointer, dtype=torch.bfloat16, progress=False)


def test_tensors_of_every_type_come_back_with_their_digest():
    values = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    assert tensors_digest(values) == tensors_digest(values.t().contiguous().t()) != tensors_digest(values + 1)
    assert tensors_digest(values, values) != tensors_digest(values)
    tensors_digest(torch.zeros(0))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("It was the best of times, it was the worst of times, it was the age of wisdom. " * 4)
    return path


def arguments(model, out, text):
    settings = ["--tokens", 24 * 64, "--sequence", 16, "--batch", 4, "--log-steps", 5, "--lr-latents", 0.01]
    return ["train", model, out, "--data", text, "--bits", 2.5, "--device", "cpu", "--save-minutes", 0, *settings]


@pytest.fixture(scope="module")
def uninterrupted(loud_llama, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    printed = out.with_name("printed")
    assert workers.ended(workers.littlebit(arguments(loud_llama, out, text), printed)) == 0, printed.read_text()
    assert "the log is in training.jsonl" in printed.read_text()
    return out


def logged(folder):
    return timeless(map(json.loads, (folder / "training.jsonl").read_text().splitlines()))


def assert_same_files(out, expected):
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()
    assert logged(out) == logged(expected)
    assert not out.with_name("out.training").exists()


def steps_done(out):
    names = [path.name for path in out.with_name("out.training").glob("step-*")]
    return max((int(name.split("-")[1]) for name in names), default=0)


def wait_for_step(process, out, step):
    """Wait until a run has saved a step, or has ended."""
    end = time.monotonic() + workers.TIMEOUT_S
    while process.is_alive() and steps_done(out) < step:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_command_killed_at_random_moments_ends_with_the_same_bytes(loud_llama, text, uninterrupted, tmp_path):
    out, chance = tmp_path / "out", random.Random(0)
    kills = 0
    for step in (0, 1, 4, 9, 15, 20):
        process = workers.littlebit(arguments(loud_llama, out, text))
        wait_for_step(process, out, step)
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        kills += workers.ended(process) == -signal.SIGKILL
    assert kills >= 4
    assert steps_done(out) >= 15
    printed = tmp_path / "printed"
    assert workers.ended(workers.littlebit(arguments(loud_llama, out, text), printed)) == 0, printed.read_text()
    assert_same_files(out, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_command_told_to_stop_saves_its_state_and_exits_with_143(loud_llama, text, uninterrupted, tmp_path, number):
    out, printed = tmp_path / "out", tmp_path / "printed"
    process = workers.littlebit(arguments(loud_llama, out, text), printed)
    wait_for_step(process, out, 6)
    os.kill(process.pid, number)
    assert workers.ended(process) == 143
    assert f"stopped after step {steps_done(out)}; its state is saved" in printed.read_text()
    assert not out.exists()
    assert workers.ended(workers.littlebit(arguments(loud_llama, out, text), printed)) == 0
    assert_same_files(out, uninterrupted)


def test_command_with_damaged_states_alone_begins_anew(loud_llama, text, uninterrupted, tmp_path):
    """From the initialisation that was asked for, not from the cheap one that goes before a state."""
    out, printed = tmp_path / "out", tmp_path / "printed"
    for name in ("first", "out"):
        init = [*arguments(loud_llama, tmp_path / name, text), "--init", "itq"]
        process = workers.littlebit(init, printed)
        if name == "first":
            assert workers.ended(process) == 0
            continue
        wait_for_step(process, out, 2)
        process.kill()
        workers.ended(process)
    for path in out.with_name("out.training").glob("step-*"):
        flip(path / "state.safetensors", -1)
    assert workers.ended(workers.littlebit(init, printed)) == 0
    assert "is corrupt" in printed.read_text()
    assert_same_files(out, tmp_path / "first")
