"""Bundled checkpoints: their content, `export_delta` and `reassemble`."""

import json
import math

import littlebit.fast as lb
import pytest
import torch
from compare import assert_same
from littlebit.fast.checkpoints.bundled import bundled, reassemble
from littlebit.fast.checkpoints.bundling import export_delta
from littlebit.fast.checkpoints.download import DATA
from littlebit.fast.checkpoints.format import WEIGHTS
from littlebit.fast.checkpoints.names import bundled_names
from littlebit.fast.cli.main import main
from safetensors import safe_open
from safetensors.torch import load_file

BUNDLED = bundled_names()
MODEL_WEIGHTS = 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 576 * 1536)  # linear layers of SmolLM2-135M


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Save a packed checkpoint of the tiny model with changed norms, as training leaves them."""
    model = lb.load_model("tiny")
    lb.quantize_(model, lb.Config(bits=2.0, paths=1), progress=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(1.5)
    return lb.save(model, tmp_path_factory.mktemp("bundled") / "out", lb.load_tokenizer("tiny"), bits=2.0)


def test_reassemble_inverts_export_delta(packed, tmp_path):
    file = tmp_path / "tiny-2bit.safetensors"
    export_delta(packed, "tiny", file, {"tokens": 7})
    assert not any("embed" in name for name in load_file(file))  # the base has it
    (tmp_path / "whole").mkdir()
    reassemble(file, tmp_path / "whole")
    before, after = load_file(packed / WEIGHTS), load_file(tmp_path / "whole" / WEIGHTS)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert_same(after[name], tensor)
    files = ("file_bytes", "description_bytes", "described_bits_per_weight", "file_bits_per_parameter")
    info = [
        {key: value for key, value in lb.info(at).items() if key not in files} for at in (packed, tmp_path / "whole")
    ]
    assert info[0] == info[1]
    assert json.loads((tmp_path / "whole" / "training.json").read_text()) == {"tokens": 7}
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        logits = [lb.load(folder)(tokens).logits for folder in (packed, tmp_path / "whole")]
    assert_same(*logits)


def test_export_delta_refuses_a_checkpoint_of_another_model(packed, tiny_llama, tmp_path):
    model = lb.load_model(tiny_llama)
    lb.quantize_(model, lb.Config(bits=2.0, paths=1), progress=False)
    other = lb.save(model, tmp_path / "other")
    with pytest.raises(lb.CheckpointError, match="must hold every tensor of its base tiny, but lacks"):
        export_delta(other, "tiny", tmp_path / "x.safetensors", {})


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_checkpoints_keep_their_bits_and_size(name):
    path = DATA / f"{name}.safetensors"
    assert path.stat().st_size <= 16 * 2**20
    with safe_open(path, framework="pt") as file:
        note = json.loads(file.metadata()["littlebit"])
    layers = note["quantization_config"]["layers"]
    assert len(layers) == 210
    linear = [tensor for key, tensor in load_file(path).items() if ".paths." in key]
    stored = 8 * sum(tensor.nbytes for tensor in linear)
    assert stored == sum(lb.layer_bits(row["d_out"], row["d_in"], row["ranks"]) for row in layers.values())
    target = float(name.removeprefix("smollm2-").removesuffix("bit"))
    assert math.floor(target * MODEL_WEIGHTS) >= stored > 0.999 * target * MODEL_WEIGHTS
    assert {"tokens", "perplexity", "lr_latents"} <= note["training"].keys()


def test_bundled_names_are_the_promised_ones():
    assert BUNDLED == ["smollm2-0.1bit", "smollm2-0.3bit", "smollm2-0.55bit", "smollm2-1bit"]


def test_bundled_is_reassembled_once(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("LITTLEBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("littlebit.fast.checkpoints.bundled.DATA", tmp_path)
    export_delta(packed, "tiny", tmp_path / "tiny-2bit.safetensors", {})
    folder = bundled("tiny-2bit")
    changed = (folder / WEIGHTS).stat().st_mtime_ns
    assert bundled("tiny-2bit") == folder
    assert (folder / WEIGHTS).stat().st_mtime_ns == changed


def test_the_tiny_model_has_a_name_and_predicts_english(capsys):
    assert main(["eval", "tiny", "--window", "256", "--max-windows", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] < 6  # bytes; a uniform guess has 260
    assert main(["fetch", "tiny"]) == 0
    assert capsys.readouterr().out.strip() == str(DATA / "tiny")
