"""Test how models are found: in the hub's cache, by misspelt names, after a change of directory."""

import json
import os
import shutil

import huggingface_hub
import littlebit.fast as lb
import pytest
import torch
from compare import assert_same
from huggingface_hub.errors import OfflineModeIsEnabled
from littlebit.fast.checkpoints.fetch import locate, resolve
from littlebit.fast.cli.estimate import estimate
from littlebit.fast.cli.main import main

BITS = 2.5
COMMIT = "a" * 40


@pytest.fixture(scope="module")
def packed(tiny_llama, tmp_path_factory):
    model = lb.load_model(tiny_llama)
    lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    return lb.save(model, tmp_path_factory.mktemp("names") / "out", lb.load_tokenizer(tiny_llama), shard_bytes=30_000)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Set up an empty hub cache and an unreachable hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(hub, name, source, leave=()):
    """Put a folder into the hub's cache as a download does: as links to blobs."""
    root = hub / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for file in source.iterdir():
        if file.name not in leave:
            shutil.copy(file, root / "blobs" / file.name)
            os.symlink(f"../../blobs/{file.name}", snapshot / file.name)
    return snapshot


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(20)[None]).logits


def test_every_command_takes_a_packed_checkpoint_by_its_hub_id(hub, packed, tmp_path, capsys):
    cached(hub, "me/packed", packed)
    assert_same(logits(lb.load("me/packed")), logits(lb.load(packed)))
    assert lb.info("me/packed") == lb.info(packed)
    assert lb.verify("me/packed") == lb.verify(packed)
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 8)
    for words in (
        ["info", "me/packed"],
        ["verify", "me/packed"],
        ["eval", "me/packed", "--text", str(text), "--window", "64", "--max-windows", "1"],
        ["export", "me/packed", str(tmp_path / "model.gguf"), "--to", "gguf"],
    ):
        assert main(words) == 0
        assert capsys.readouterr().out
    printed = []
    for name in ("me/packed", str(packed)):
        assert main(["generate", name, "--prompt", "hi", "--max-new-tokens", "4"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert lb.generate(lb.load("me/packed"), "hi", 4) == printed[0].rstrip("\n")


def test_a_dense_model_is_quantised_by_its_hub_id_and_planned_without_weights(hub, tiny_llama, packed):
    cached(hub, "me/dense", tiny_llama)
    cached(hub, "me/small", tiny_llama, leave=["model.safetensors"])
    assert_same(logits(lb.load_model("me/dense")), logits(lb.load_model(tiny_llama)))
    assert estimate("me/small", lb.Config(bits=BITS))["weights"] == lb.info(packed)["weights"]
    with pytest.raises(lb.CheckpointError, match=r"there is no model\.safetensors"):
        lb.load_model("me/small")


def test_a_shard_that_the_cache_lacks_is_named(hub, packed):
    name = sorted(file.name for file in packed.glob("model-*.safetensors"))[1]
    cached(hub, "me/part", packed, leave=[name])
    with pytest.raises(lb.CheckpointError, match=name):
        lb.load("me/part")


@pytest.mark.parametrize("command", ["quantize", "eval", "generate", "info", "verify", "export"])
def test_a_misspelt_name_fails_at_once_with_the_nearest_ones(command, monkeypatch, tmp_path, capsys):
    def refuse(*arguments, **options):
        pytest.fail("the hub was asked for a name that cannot be there")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    rest = {"quantize": [str(tmp_path / "out")], "generate": ["--prompt", "hi"], "export": ["o", "--to", "gguf"]}
    for wrong, right in {"smolm2-0.55bit": "smollm2-0.55bit", "smollm": "smollm2", "Tiny": "tiny"}.items():
        assert main([command, wrong, *rest.get(command, [])]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"did you mean {right}" in error


def test_a_name_with_an_owner_is_asked_for_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    asked = []

    def unreachable(*arguments, **options):
        asked.append(options)
        raise OfflineModeIsEnabled("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    assert main(["info", "HuggingFaceTB/SmolLM2-135M"]) == 2
    error = capsys.readouterr().err
    assert len(asked) == 1
    assert "the hub cannot be reached, and its cache does not hold the model" in error
    assert "did you mean smollm2" in error


@pytest.mark.parametrize("name", ["a/b/c", "../there", "/no/such/place", "a b/c", "-x/-y/", "", "~/models"])
def test_what_is_no_hub_id_is_never_asked_for(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *each, **options: pytest.fail("asked"))
    with pytest.raises(lb.CheckpointError, match=r"cannot load a model from|is not a model directory"):
        locate(name)


def test_a_misspelt_folder_or_file_is_suggested(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "my-llama")
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(lb.CheckpointError, match=r"did you mean \S*/my-llama\?$"):
        lb.load(tmp_path / "my-lama")
    with pytest.raises(lb.CheckpointError, match=r"no such file: \S*; did you mean \S*/model\.gguf\?$"):
        lb.load_model(tmp_path / "mdel.gguf")


def test_fetch_suggests_names(capsys):
    assert main(["fetch", "smollm2-0.5bit"]) == 2
    assert "did you mean smollm2-0.55bit" in capsys.readouterr().err


def test_a_relative_path_survives_a_change_of_directory(packed, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(packed.parent)
    model = lb.load(packed.name)
    (tmp_path / "link").symlink_to(tiny_llama)
    monkeypatch.chdir(tmp_path)
    dense = lb.load_model("link")
    monkeypatch.chdir("/")
    assert model.name_or_path == str(packed)
    assert dense.name_or_path == str(tmp_path / "link")
    assert lb.generate(model, "hi", 2) == lb.generate(lb.load(packed), "hi", 2)
    assert isinstance(lb.generate(dense, "hi", 2), str)
    assert resolve(packed) == packed


def test_generate_says_that_a_tokenizer_is_to_be_passed(packed, tmp_path):
    out = shutil.copytree(packed, tmp_path / "out")
    for file in out.glob("tokenizer*"):
        file.unlink()
    model = lb.load(out)
    for place in (str(out), ""):
        model.name_or_path = place
        with pytest.raises(ValueError, match="tokenizer=") as raised:
            lb.generate(model, "hi", 2)
        assert "\n" not in str(raised.value)
    assert lb.generate(model, "hi", 2, tokenizer=lb.load_tokenizer(packed)) == lb.generate(lb.load(packed), "hi", 2)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "littlebit"
