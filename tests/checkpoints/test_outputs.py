"""Test that any output path works or is refused before the work, and that existing files stay."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import littlebit.fast as lb
import pytest
import torch
from littlebit.fast.checkpoints.gguf import check_gguf
from littlebit.fast.checkpoints.saving import check_target
from littlebit.fast.cli.main import main
from littlebit.fast.files import cache
from littlebit.fast.files.atomic import atomic_directory, check_file, check_folder, check_room, write_text

LONG = "n" * 255


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, overwrite=False):
    with atomic_directory(Path(path), overwrite) as part:
        (part / "file").write_text("new")


def names(folder):
    return sorted(entry.name for entry in Path(folder).iterdir())


@pytest.mark.parametrize("path", ["out", "out/", "./out", "new/parents/out", "a b", "a\nb", LONG, "x/../out", "*", "-"])
def test_a_folder_is_written_wherever_a_shell_can_name_it(path, here):
    (here / "x").mkdir()
    check_target(Path(path), False)
    assert names(here) == ["x"]  # nothing is left by the check, no parents either
    write(path)
    assert names(path) == ["file"]
    assert not [name for name in names(Path(path).parent) if name.startswith(".")]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_folder_is_followed_and_stays(there, here):
    (here / "disk").mkdir()
    if there:
        (here / "disk" / "real").mkdir()
    (here / "link").symlink_to("disk/real")
    check_target(here / "link", False)
    write("link")
    assert (here / "link").is_symlink()
    assert names("disk/real") == ["file"]
    write("link", overwrite=True)
    assert names("disk") == ["real"]


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("", "this process runs in it"),
        (".", "this process runs in it"),
        ("..", "is not a LittleBit checkpoint"),
        ("file", "is not a LittleBit checkpoint"),
        ("file/out", "is not a folder"),
        ("file/", "is not a LittleBit checkpoint"),
        ("loop", "cannot write"),
        ("/dev/null", "is not a LittleBit checkpoint"),
        ("/dev/stdout", "is not a LittleBit checkpoint|cannot write"),
        ("~/out", "the shell did not replace"),
        ("n" * 256, "at most 255 bytes"),
        ("new/" + "é" * 128, "at most 255 bytes"),
        (os.fsdecode(b"caf\xe9"), "must be UTF-8"),
        ("full", "is not a LittleBit checkpoint"),
    ],
)
def test_other_folders_are_refused_before_the_work(path, why, here):
    folder = here / "here"
    (folder / "full" / "mine").mkdir(parents=True)
    os.chdir(folder)
    Path("file").write_text("mine")
    Path("loop").symlink_to("loop")
    if path in ("", "."):
        os.chdir("full/mine")
    before = sorted(folder.rglob("*"))
    with pytest.raises(OSError, match=why) as refused:
        check_target(Path(path), False)
    assert "\udce9" not in str(refused.value)  # it can be printed
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV, errno.EACCES])
def test_what_cannot_be_moved_away_is_refused(code, here, monkeypatch):
    (here / "out").mkdir()
    check_folder(here / "out")
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError(code, "no")))
    with pytest.raises(OSError, match="choose a folder inside it"):
        check_folder(here / "out")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount")
def test_mount_points_and_read_only_places_are_refused(here):
    code = """
import sys; from pathlib import Path; from littlebit.fast.files.atomic import check_folder
for path in ("out", "closed/out", "closed"):
    try: check_folder(Path(path).resolve())
    except OSError as error: print(error)
    else: print("passed")
"""
    for name in ("out", "closed"):
        (here / name).mkdir()
    mount = "mount -t tmpfs none out && mount -t tmpfs -o ro none closed"
    command = ["unshare", "-m", "sh", "-c", f'{mount} || exit 9; exec "$@"', "sh", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("nothing can be mounted here")
    first, second, third = done.stdout.splitlines()
    assert "it is a mount point" in first
    assert "Read-only file system" in second
    assert "it is a mount point" in third


def test_a_file_is_written_whole_through_links_and_to_devices(here, monkeypatch, capsys):
    for path in ("f.html", "new/f.html", "./f.html", LONG, "f\n"):
        check_file(path)
        write_text(path, "text")
        assert Path(path).read_text() == "text"
    Path("link").symlink_to("new/target")
    write_text("link", "text")
    assert Path("link").is_symlink()
    assert Path("new/target").read_text() == "text"
    write_text("/dev/null", "text")
    assert not Path("/dev/null").is_file()
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space left on device; an earlier file is unchanged"):
        write_text("f.html", "other")
    assert Path("f.html").read_text() == "text"
    assert not [name for name in names(".") if name.startswith(".")]


def test_standard_output_may_be_named_whatever_it_is(here):
    """A file that stdout is redirected to must not be replaced while the process prints to it."""
    code = "import sys; from littlebit.fast.files.atomic import write_text; print('before', flush=True)"
    code += "; write_text('/dev/stdout', 'text\\n'); print('after')"
    with Path("log").open("w") as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, check=True)
    assert Path("log").read_text() == "before\ntext\nafter\n"


@pytest.mark.parametrize(
    ("path", "why"), [("folder", "is a folder"), ("file/x", "is not a folder"), ("n" * 256, "255"), ("~/x", "shell")]
)
def test_other_files_are_refused_before_the_work(path, why, here):
    (here / "folder").mkdir()
    (here / "file").write_text("mine")
    with pytest.raises(OSError, match=why):
        check_file(path)
    with pytest.raises(OSError, match=f"{why}|exists already"):
        check_gguf(Path(path), True)
    assert names(here) == ["file", "folder"]


def test_a_gguf_file_never_takes_the_place_of_a_device():
    with pytest.raises(FileExistsError):
        check_gguf(Path("/dev/null"), True)


def test_room_on_the_disk_is_looked_for_before_the_work(here, monkeypatch):
    free = shutil.disk_usage(here)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    check_room(here / "new" / "out", 1000)
    with pytest.raises(OSError, match="needs about 1,001 bytes, but 1,000 are free"):
        check_room(here / "new" / "out", 1001)


def test_commands_refuse_an_output_before_the_work(tiny_llama, here, capsys, monkeypatch):
    """For each command: a folder that is not a checkpoint, a file where a folder is, a full disk, the model itself."""
    monkeypatch.setattr(lb, "load_model", lambda *_: pytest.fail("the model was loaded"))
    (here / "full").mkdir()
    (here / "full" / "mine").write_text("")
    shutil.copytree(tiny_llama, here / "model")

    def refused(*arguments):
        assert main([*map(str, arguments)]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("littlebit: error: ")
        assert len(error.splitlines()) == 1
        assert names(here) == ["full", "model"]
        return error

    assert "not a LittleBit checkpoint" in refused("quantize", "model", "full")
    assert "not a LittleBit checkpoint" in refused("train", "model", "full")
    assert "not a LittleBit checkpoint" in refused("quantize", "model", "model", "--overwrite")
    assert "is a folder" in refused("quantize", "model", "out", "--bits", "2.5", "--report", "full")
    assert "is a folder" in refused("bench", "linear", "--save", "full")
    assert "is not a folder" in refused("demo", "--out", "full/mine")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    assert "are free; make room" in refused("quantize", "model", "out", "--bits", "2.5")


def test_exports_refuse_an_output_before_the_work_and_never_remove_their_model(tiny_llama, here, capsys):
    model = lb.load_model(tiny_llama)
    lb.quantize_(model, lb.Config(bits=2.5), progress=False)
    lb.save(model, "packed", lb.load_tokenizer(tiny_llama))
    (here / "packed" / "inner").mkdir()
    lb.save(model, "packed/inner/deep", lb.load_tokenizer(tiny_llama))
    (here / "link").symlink_to("packed")
    for source, out in (("packed", "link"), ("packed/inner/deep", "packed")):
        assert main(["export", source, out, "--to", "official", "--overwrite"]) == 2
        assert "holds the model" in capsys.readouterr().err
    assert main(["export", "packed", "packed/inner", "--to", "gguf", "--overwrite"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert names("packed/inner/deep") == sorted(set(names("packed")) - {"inner"})


@pytest.mark.parametrize("value", [1e5, float("nan"), float("inf")])
def test_what_does_not_fit_the_format_is_found_before_the_work(value, tiny_llama, monkeypatch):
    model = lb.load_model(tiny_llama)
    model.model.norm.weight.data[3] = value
    with pytest.raises(ValueError, match=r"tensor model.norm.weight does not fit float16"):
        lb.quantize_(model, lb.Config(bits=2.5), progress=False)
    assert isinstance(model.model.layers[0].self_attn.q_proj, torch.nn.Linear)


# The cache


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Unset all variables that name the cache, and put the temporary directory into the test folder."""
    for name in ("LITTLEBIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    forget = cache.first_writable_folder.cache_clear
    forget()
    yield tmp_path
    forget()


def test_cache_is_where_the_variables_say(places, monkeypatch):
    assert cache.cache_path("a", "b") == places / "home" / ".cache" / "littlebit" / "a" / "b"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored
    assert cache.cache_path("a").is_relative_to(places / "home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(places / "xdg"))
    assert cache.cache_path("a") == places / "xdg" / "littlebit" / "a"
    monkeypatch.setenv("LITTLEBIT_CACHE", str(places / "own"))
    assert cache.cache_path("a") == places / "own" / "a"


def test_cache_without_a_home_is_among_the_temporary_folders_and_this_users_alone(places, monkeypatch):
    monkeypatch.setenv("HOME", "/dev/null/none")
    folder = cache.cache_path("a").parent
    assert folder.parent == places / "tmp"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)  # whoever may write there could give us code
    cache.first_writable_folder.cache_clear()
    with pytest.raises(OSError, match="set LITTLEBIT_CACHE to a writable folder"):
        cache.cache_path("a")
    folder.rmdir()
    folder.symlink_to(places)
    with pytest.raises(OSError, match="set LITTLEBIT_CACHE"):
        cache.cache_path("a")


def test_cache_finds_what_is_there_where_nothing_can_be_written(places, monkeypatch):
    """As in a container that contains the models and has a read-only root."""
    entry = cache.cache_path("a")
    entry.mkdir(parents=True)
    monkeypatch.setattr(cache, "first_writable_folder", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
    assert cache.cache_path("a") == entry
    with pytest.raises(OSError, match="read-only"):
        cache.cache_path("b")


def test_cache_has_room(places, monkeypatch):
    usage = shutil.disk_usage
    full = places / "home"
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage(path)._replace(free=9 if Path(path).is_relative_to(full) else 99)
    )
    assert cache.cache_path("a", room=9).is_relative_to(full)
    assert cache.cache_path("b", room=10).is_relative_to(places / "tmp")
    with pytest.raises(OSError, match="only 9 bytes are free there"):
        cache.cache_path("b", room=100)


def test_compiled_kernels_are_kept_where_numba_finds_no_place(places, monkeypatch):
    import numba
    from littlebit.fast import kernels

    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    kernels.place_compiled_code()
    assert numba.config.CACHE_DIR == ""  # it found one
    monkeypatch.setattr(numba, "njit", lambda **_: (_ for _ in ()).throw(RuntimeError("no locator")))
    kernels.place_compiled_code()
    assert Path(numba.config.CACHE_DIR) == places / "home" / ".cache" / "littlebit" / "kernels"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    cache.first_writable_folder.cache_clear()
    with pytest.raises(OSError, match="set LITTLEBIT_CACHE to a writable folder, with 32 MiB free"):
        kernels.place_compiled_code()
