"""Test atomic directories: locks, leftovers of killed writers, and two writers of one output."""

import os
from pathlib import Path

import littlebit.fast as lb
import pytest
from littlebit.fast.files import atomic
from littlebit.fast.files.atomic import PART, atomic_directory, lock_directory, temporary_sibling, unlock
from littlebit.fast.files.cache import build_once


def write(path, text, overwrite=False):
    with atomic_directory(path, overwrite) as part:
        (part / "file").write_text(text)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_output_is_replaced_only_if_asked_for(can_exchange, tmp_path, monkeypatch):
    if not can_exchange:
        monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    path = tmp_path / "out"
    write(path, "first")
    with pytest.raises(OSError, match="nothing was left there"):
        write(path, "second")
    assert (path / "file").read_text() == "first"
    write(path, "third", overwrite=True)
    assert (path / "file").read_text() == "third"
    assert list(tmp_path.iterdir()) == [path]


def test_exchange_never_leaves_the_place_empty(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    write(one, "1")
    write(other, "2")
    if not atomic.exchange(one, other):
        pytest.skip("this file system cannot exchange directories")
    assert ((one / "file").read_text(), (other / "file").read_text()) == ("2", "1")
    assert not atomic.exchange(one, tmp_path / "nowhere")


def test_what_a_killed_writer_left_is_removed_and_what_others_write_is_not(tmp_path):
    left, mine, other = (tmp_path / name for name in (f".out-abcdefgh{PART}", ".out-backup", f".out2-abcdefgh{PART}"))
    for folder in (left, mine, other):
        (folder / "inner").mkdir(parents=True)
    with temporary_sibling(tmp_path / "out") as at_work:
        (at_work / "file").write_text("")
        write(tmp_path / "out", "second")
        assert (at_work / "file").exists()
        assert not left.exists()
    assert not at_work.exists()
    assert mine.exists()
    assert other.exists()


def test_a_place_without_locks_is_written_and_nothing_is_removed(tmp_path, monkeypatch):
    left = tmp_path / f".out-abcdefgh{PART}"
    left.mkdir()
    monkeypatch.setattr(atomic, "fcntl", None)
    write(tmp_path / "out", "first")
    assert (tmp_path / "out" / "file").read_text() == "first"
    assert left.exists()


def test_a_lock_is_held_by_one(tmp_path):
    lock = lock_directory(tmp_path)
    with pytest.raises(BlockingIOError):
        lock_directory(tmp_path)
    unlock(lock)
    unlock(lock_directory(tmp_path))


def test_build_once_takes_what_another_made_and_shows_other_errors(tmp_path):
    path, calls = tmp_path / "made", []

    def make(part):
        calls.append(part)
        write(path, "by another")
        (part / "file").write_text("mine")

    assert (build_once(path, make) / "file").read_text() == "by another"
    assert build_once(path, make) == path
    assert len(calls) == 1
    with pytest.raises(OSError, match="no such"):
        build_once(tmp_path / "other", lambda part: (_ for _ in ()).throw(OSError("no such")))
    assert list(tmp_path.iterdir()) == [path]


def test_everything_is_flushed_to_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    """The calls are recorded: fsync of every file and folder, the rename, fsync of the parent."""
    done = []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *places: (done.append("renamed"), rename(*places)))
    monkeypatch.setattr(atomic, "fsync_path", lambda path: done.append(Path(path).name))
    with atomic_directory(tmp_path / "out") as part:
        (part / "inner").mkdir()
        (part / "inner" / "file").write_text("")
    assert set(done[:3]) == {"file", "inner", part.name}
    assert done[3:] == ["renamed", tmp_path.name]


def test_a_folder_of_states_is_used_by_one_process(tmp_path):
    first, second = lb.Checkpointer(tmp_path), lb.Checkpointer(tmp_path)
    with first.exclusive(), pytest.raises(OSError, match="another process is training"), second.exclusive():
        pass
    with second.exclusive():
        pass
