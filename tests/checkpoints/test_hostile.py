"""Test that corrupt and malicious checkpoints are refused by name, without using much memory or time."""

import base64
import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import fuzz
import littlebit.fast as lb
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from littlebit.fast.checkpoints.checksums import make_checksums
from littlebit.fast.checkpoints.format import FORMAT_VERSION, FORMATS, INDEX, WEIGHTS, has_pad_bits
from littlebit.fast.checkpoints.saving import tensor_digests
from littlebit.fast.cli.main import main
from littlebit.fast.decoding.architecture import NotDecodableError
from littlebit.fast.decoding.mapped_weights import map_model
from littlebit.fast.files.digests import json_digest
from littlebit.fast.files.untrusted import resolve_inside
from littlebit.fast.models.build import plain_settings
from littlebit.fast.packing import row_words
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parents[1] / "data" / "checkpoints"
READERS = (lb.info, lb.verify, lb.load)
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def seeds():
    return fuzz.seeds()


@pytest.fixture(scope="module")
def judge(seeds, tmp_path_factory):
    return fuzz.Judge(seeds, tmp_path_factory.mktemp("hostile") / "case")


@pytest.fixture
def written(seeds, tmp_path):
    """Write one of the seeds into a folder."""

    def write(kind="whole", **changes):
        fuzz.write(seeds[kind] | changes, tmp_path / kind)
        return tmp_path / kind

    return write


class Drawn:
    """Give the fuzzer Hypothesis's random choices."""

    def __init__(self, data):
        self.data = data

    def integer(self, low, high):
        return self.data.draw(st.integers(low, high))

    def choice(self, values):
        return values[self.integer(0, len(values) - 1)]


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_mutated_checkpoint_loads_identically_or_is_refused(seeds, judge, data):
    judge.case(*fuzz.mutated(seeds, Drawn(data)))


@pytest.mark.parametrize("kind", ["whole", "tables", "shards", "gpt2", "fused"])
def test_every_flipped_bit_of_a_tensor_is_found_and_named(kind, written, capsys):
    path = written(kind)
    for file in path.glob("*.safetensors"):
        header = 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
        places = json.loads(file.read_bytes()[8:header])
        for name in names:
            first, last = places[name]["data_offsets"]
            for at in (first, (first + last) // 2, last - 1):
                data = bytearray(file.read_bytes())
                data[header + at] ^= 16
                file.write_bytes(data)
                assert lb.verify(path)["damaged"] == [name]
                with pytest.raises(lb.CheckpointError, match=rf"is damaged: {name} changed since it was saved"):
                    lb.load(path)
                data[header + at] ^= 16
                file.write_bytes(data)
    assert lb.verify(path)["damaged"] == []
    if kind in ("whole", "tables", "shards"):
        map_model(path)
        file = next(path.glob("*.safetensors"))
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        with pytest.raises((lb.CheckpointError, NotDecodableError)):
            map_model(path)
        data[-1] ^= 1
        file.write_bytes(data)
    assert main(["verify", str(path)]) == 0
    assert "as they were saved (SHA-256)" in capsys.readouterr().out


def test_a_setting_that_changed_is_found_and_may_be_accepted(written, capsys):
    path = written()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config))  # the same, but for blanks
    lb.load(path)
    (path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(lb.CheckpointError, match=r"config\.json changed since it was saved.*verify=False"):
        lb.load(path)
    assert lb.load(path, verify=False).config.rms_norm_eps == 1e-3
    assert main(["verify", str(path), "--json"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["damaged"] == ["config.json"]
    assert "config.json changed since it was saved" in printed.err


def test_checksums_that_are_missing_are_missed(written):
    path = written()
    save_file(load_file(path / WEIGHTS), path / WEIGHTS, metadata={"format": "pt"})
    for read in READERS[1:]:
        with pytest.raises(lb.CheckpointError, match="must hold checksums, as its format_version is 3"):
            read(path)


@pytest.mark.parametrize("version", FORMATS[:-1])
def test_checksums_of_an_older_version_do_not_do(version, tmp_path):
    """The config.json of an older checkpoint is edited to claim the newest version, which requires more checksums."""
    path = shutil.copytree(DATA / f"format-{version}", tmp_path / "copy")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["format_version"] = FORMAT_VERSION
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(lb.CheckpointError, match="must hold checksums, as its format_version is 3"):
        lb.verify(path)


def changed_tensors(path, change):
    """Change the tensors of a checkpoint but keep its checksums; return the names before and after."""
    with safe_open(path / WEIGHTS, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(path / WEIGHTS)
    before = set(tensors)
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata=metadata)
    return before, set(tensors)


def test_tensors_that_were_added_or_renamed_are_named(written):
    path = written()
    changed_tensors(path, lambda tensors: tensors.update(x=torch.zeros(1)))
    assert lb.verify(path)["damaged"] == ["x"]
    changed_tensors(path, lambda tensors: tensors.update(y=tensors.pop("x")))
    assert lb.verify(path)["damaged"] == ["y"]


def test_tensors_that_were_swapped_are_both_named(written):
    path, names = written(), [f"model.layers.0.self_attn.{layer}_proj.paths.0.g" for layer in "kv"]
    changed_tensors(path, lambda tensors: tensors.update({names[0]: tensors[names[1]], names[1]: tensors[names[0]]}))
    assert sorted(lb.verify(path)["damaged"]) == names


def test_a_tensor_that_was_removed_is_missed(written):
    """A packed tensor is named, as config.json asks for it; any other is noticed by the checksum of the set."""
    path = written()
    changed_tensors(path, lambda tensors: tensors.pop("model.norm.weight"))
    assert lb.verify(path)["damaged"] == ["the list of tensors"]
    with pytest.raises(lb.CheckpointError, match="the list of tensors changed since it was saved"):
        lb.load(path)
    changed_tensors(path, lambda tensors: tensors.pop(f"{LAYER}.paths.0.ell"))
    with pytest.raises(lb.CheckpointError, match=f"tensor {LAYER}.paths.0.ell is missing"):
        lb.verify(path)


def of_another_model(path, folder):
    """Save a checkpoint with the same configuration, sizes and files, but other weights."""
    model = lb.load(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return lb.save(model, folder, bits=5, shard_bytes=5000)


def from_pretrained(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def test_shards_of_two_checkpoints_do_not_mix(written, tmp_path, capsys):
    path = written("shards")
    other = of_another_model(path, tmp_path / "other")
    assert (other / "config.json").read_bytes() == (path / "config.json").read_bytes()
    names = sorted(file.name for file in path.glob("*.safetensors"))
    assert len(names) > 1
    for name in names:
        mixed = shutil.copytree(path, tmp_path / "mixed")
        shutil.copyfile(other / name, mixed / name)
        for read in (*READERS, map_model, from_pretrained):
            with pytest.raises(lb.CheckpointError, match="were not saved together"):
                read(mixed)
        assert main(["verify", str(mixed)]) == 2
        assert "were not saved together" in capsys.readouterr().err
        shutil.rmtree(mixed)


def test_a_shard_whose_checksums_were_moved_is_found(written, tmp_path):
    """A file of another checkpoint that claims this one's set still has the wrong tensor digests."""
    path = written("shards")
    other = of_another_model(path, tmp_path / "other")
    name = sorted(file.name for file in path.glob("*.safetensors"))[-1]
    with safe_open(path / name, framework="pt") as opened:
        metadata, names = opened.metadata(), list(opened.keys())
    save_file(load_file(other / name), path / name, metadata=metadata)
    assert set(lb.verify(path)["damaged"]) <= set(names)
    for read in (lb.load, map_model, from_pretrained):
        with pytest.raises(lb.CheckpointError, match="changed since it was saved"):
            read(path)


def json_text(value):
    return json.dumps(value, sort_keys=True).encode()


@pytest.mark.parametrize("kind", ["whole", "tables", "shards"])
def test_checksums_are_as_specified(kind, written):
    """They are recomputed from the bytes of the files with hashlib, by the specification in checksums.py."""
    path = written(kind)
    digests, found = {}, {}
    for file in path.glob("*.safetensors"):
        data = file.read_bytes()
        start = 8 + struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:start])
        found[file] = json.loads(header.pop("__metadata__")["checksums"]), sorted(header)
        for name, entry in header.items():
            first, last = (start + at for at in entry["data_offsets"])
            said = f"{entry['dtype']} {entry['shape']}\n".encode() + data[first:last]
            digests[name] = hashlib.sha256(said).hexdigest()
    config = hashlib.sha256(json_text(json.loads((path / "config.json").read_text()))).hexdigest()
    whole = hashlib.sha256(json_text({"config": config, "tensors": digests})).hexdigest()
    for checksums, names in found.values():
        tags = sorted(hashlib.sha256(f"{name} {digests[name]}".encode()).digest()[:8] for name in names)
        assert checksums == {"config": config, "set": whole, "tensors": base64.b64encode(b"".join(tags)).decode()}


def test_checksums_take_eleven_characters_a_tensor(written):
    path = written()
    with safe_open(path / WEIGHTS, framework="pt") as opened:
        size, count = len(opened.metadata()["checksums"]), len(list(opened.keys()))
    fixed = len(json.dumps({"config": 64 * "0", "set": 64 * "0", "tensors": ""}))
    assert size == fixed + 4 * -(-8 * count // 3)


@pytest.mark.parametrize(
    "described",
    [
        {},
        {"config": "0", "set": "0", "tensors": {}},
        {"config": "0", "set": "0", "tensors": "AAAA"},  # three bytes
        {"config": "0", "set": "0", "tensors": "no base64"},
        {"config": "0", "set": 0, "tensors": ""},
        {"config": 0, "tensors": {}},
        {"config": "0", "tensors": {"a": 1}},
    ],
)
def test_checksums_in_no_known_form_are_refused(described, written):
    path = written()
    save_file(load_file(path / WEIGHTS), path / WEIGHTS, metadata={"checksums": json.dumps(described)})
    with pytest.raises(lb.CheckpointError, match="is damaged or incomplete"):
        lb.verify(path)


def test_digests_tell_contents_dtypes_and_shapes_apart():
    def tensor_digest(tensor):
        return tensor_digests({"x": tensor})["x"]

    ones = torch.ones(4, 6, dtype=torch.int16)
    others = [ones.T.contiguous(), ones.half().view(torch.int16), ones.view(torch.float16), ones[:, :3]]
    assert len({tensor_digest(tensor) for tensor in (ones, *others)}) == 5
    assert tensor_digest(ones.T.contiguous().T) == tensor_digest(ones)
    assert tensor_digest(torch.tensor(3)) != tensor_digest(torch.tensor([3]))
    assert json_digest({"a": 1, "b": [2]}) == json_digest({"b": [2], "a": 1}) != json_digest({"a": 1, "b": [3]})


@pytest.mark.parametrize("version", FORMATS)
def test_checkpoints_of_every_format_version_load(version):
    """The version of littlebit that introduced a format wrote its checkpoint, which never changes."""
    path = DATA / f"format-{version}"
    model = lb.load(path)
    expected = json.loads((path / "expected.json").read_text())
    tokens = torch.tensor([expected["tokens"]])
    with torch.inference_mode():
        assert model(tokens).logits[0, -1].argsort()[-5:].tolist() == expected["best"]
    assert {key: lb.info(path)[key] for key in ("format", "linear_bytes", "checksums")} == expected["info"]
    assert lb.verify(path)["damaged"] == []


def test_the_newest_format_is_kept_too():
    assert sorted(path.name for path in DATA.iterdir()) == [
        f"format-{version}" for version in range(1, FORMAT_VERSION + 1)
    ]


# --- what the fuzzers and an attacker come up with


def header_of(claimed, text=b"{}"):
    return struct.pack("<Q", claimed) + text


def header_with(shape, last):
    return fuzz.joined({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, last]}}, b"")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (WEIGHTS, header_of(1 << 40), "claims a header of 1,099,511,627,776 bytes"),
        (WEIGHTS, header_of(2**64 - 1), "claims a header"),
        (WEIGHTS, header_of(2, b"[]"), "damaged or incomplete"),
        (WEIGHTS, header_with([1 << 40], 1 << 42), "damaged"),
        (WEIGHTS, header_with([0, 2**63], 0), r"damaged|missing"),
        ("config.json", b"[" * 100_000, "is damaged"),
        ("config.json", b'{"a": "\\ud800"}', "is damaged"),
        ("config.json", b"\xff\xfe", "is damaged"),
        ("config.json", b"[1]", "not an object"),
        ("config.json", b" " * ((1 << 25) + 1), "larger than 33,554,432 bytes"),
        (INDEX, b'{"weight_map": {"a": "/etc/passwd"}}', "not the name of a file"),
        (INDEX, b'{"weight_map": {"a": ".."}}', "leads out of its directory"),
        (INDEX, b'{"weight_map": {"a": "x\\u0000y"}}', "not the name of a file"),
        (INDEX, b'{"weight_map": {"a": 3}}', "must name files beside it"),
        (INDEX, b'{"weight_map": {"a": []}}', "is damaged"),
    ],
)
def test_readers_refuse_files_that_lie(name, content, message, written):
    path = written(**{name: content})
    with fuzz.guarded():
        for read in READERS:
            with pytest.raises(lb.CheckpointError, match=message):
                read(path)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
@pytest.mark.parametrize("target", ["/dev/zero", "/etc/passwd", "outside", "loop", "folder", "pipe"])
def test_readers_open_ordinary_files_in_the_directory_alone(name, target, written, tmp_path):
    path = written()
    (tmp_path / "outside").write_bytes((path / name).read_bytes())
    (path / name).unlink()
    if target == "folder":
        (path / name).mkdir()
    elif target == "pipe":
        os.mkfifo(path / name)
    else:
        (path / name).symlink_to({"outside": tmp_path / "outside", "loop": name}.get(target, target))
    with fuzz.guarded():
        for read in READERS:
            with pytest.raises(lb.CheckpointError, match=r"leads out of|not an ordinary file|cannot be read"):
                read(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizers_outside_the_directory_are_not_opened(name, tiny_llama, tmp_path, capsys):
    model = lb.load_model(tiny_llama)
    lb.quantize_(model, lb.Config(bits=2.5), progress=False)
    path = lb.save(model, tmp_path / "out", lb.load_tokenizer(tiny_llama))
    outside = tmp_path / "outside"
    (path / name).rename(outside)
    (path / name).symlink_to(outside)
    with pytest.raises(lb.CheckpointError, match=f"{name} is a link that leads out of its directory"):
        lb.load_tokenizer(path)
    for command in (["generate", str(path), "--prompt", "x"], ["eval", str(path), "--text", str(outside)]):
        assert main(command) == 2
        assert "is a link that leads out of its directory" in capsys.readouterr().err


def test_links_inside_a_directory_and_in_the_cache_of_the_hub_are_followed(written, tmp_path):
    path = written()
    expected = fuzz.state(lb.load(path))
    (path / WEIGHTS).rename(path / "blob")
    (path / WEIGHTS).symlink_to("blob")
    assert fuzz.state(lb.load(path)) == expected
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs = shutil.copytree(path, tmp_path / "models--a--b" / "blobs", symlinks=False)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert fuzz.state(lb.load(snapshot)) == expected
    (tmp_path / "models--a--b" / "elsewhere").write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../elsewhere")
    with pytest.raises(lb.CheckpointError, match="leads out of its directory"):
        lb.load(snapshot)


def test_names_are_those_of_files_in_the_folder(tmp_path):
    (tmp_path / "a").write_text("")
    assert resolve_inside(tmp_path, "a") == tmp_path / "a"
    for name in ("", ".", "..", "../a", "b/../a", str(tmp_path / "a"), "a\0"):
        with pytest.raises(lb.CheckpointError):
            resolve_inside(tmp_path, name)


@pytest.mark.parametrize(
    "settings_",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 60_000},
        {"num_labels": 10**9},
        {"vocab_size": 10**13},
        {"hidden_size": 10**11},
        {"head_dim": 10**11},
        {"intermediate_size": 10**13},
        {"model_type": "gpt2", "n_positions": 10**8, "n_embd": 32, "n_head": 2, "n_layer": 1},
    ],
)
def test_settings_that_ask_for_too_much_cost_nothing(settings_, written):
    """Both without checksums, and with checksums of the changed files."""
    for kind in ("old", "whole"):
        path = written(kind)
        config = json.loads((path / "config.json").read_text()) | settings_
        (path / "config.json").write_text(json.dumps(config))
        if kind == "whole":
            tensors = load_file(path / WEIGHTS)
            save_file(tensors, path / WEIGHTS, metadata=make_checksums([tensor_digests(tensors)], config)[0])
        with fuzz.guarded(), pytest.raises(lb.CheckpointError):
            lb.load(path)


@pytest.mark.parametrize("bits", [-0.55, -1, 0, 0.0, float("nan"), float("inf"), -float("inf"), True, "0.55", [1]])
def test_targets_that_are_no_positive_number_are_refused(bits, written):
    for kind, name in (("whole", "config.json"), ("official", "littlebit_config.json")):
        path = written(kind)
        config = json.loads((path / name).read_text())
        (config["quantization_config"] if kind == "whole" else config)["bits" if kind == "whole" else "eff_bit"] = bits
        (path / name).write_text(json.dumps(config))
        for read in READERS:
            with pytest.raises(lb.CheckpointError, match=r"'(bits|eff_bit)' must be a positive number of bits or null"):
                read(path)


def test_settings_that_name_code_are_left_out():
    given_ = {"auto_map": {"AutoConfig": "x.Y"}, "_attn_implementation": "someone/kernel", "hidden_size": 8}
    nested = given_ | {"text_config": dict(given_), "layers": [given_]}
    assert plain_settings(nested) == {
        "hidden_size": 8,
        "text_config": {"hidden_size": 8},
        "layers": [{"hidden_size": 8}],
    }


def test_no_code_of_a_checkpoint_runs(written, tmp_path, monkeypatch):
    """The module that auto_map and the tokenizer's settings name would write a file if it ran."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    path = written("old")
    mark = tmp_path / "ran"
    (path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    names = {name: "evil.Evil" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    lb.load(path)
    (path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    dense = shutil.copytree(path, tmp_path / "dense")
    config.pop("quantization_config")
    (dense / "config.json").write_text(json.dumps(config | {"auto_map": names, "model_type": "unheard-of"}))
    for read in (lambda: lb.load_tokenizer(path), lambda: lb.load_model(dense), lambda: lb.load_tokenizer(dense)):
        with pytest.raises(ValueError, match=r"."):  # transformers has its own words for it
            read()
    assert not mark.exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"model": {"type": "BPE"}}', b"[" * 2000])
def test_damaged_tokenizers_are_refused_with_a_message(name, content, written, capsys):
    path = written("old", **{"tokenizer.json": b"{}", "tokenizer_config.json": b"{}", name: content})
    assert main(["eval", str(path)]) == 2
    assert "littlebit: error: " in capsys.readouterr().err


@given(st.integers(1, 80), st.integers(0, 2**32))
def test_pad_bits_are_seen_and_others_are_not(count, seed):
    number, dtype = row_words(count)
    width = 8 * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    words = lb.pack_signs(torch.randn(3, count, generator=generator)).numpy()
    assert not has_pad_bits(words, count)
    assert not has_pad_bits(lb.pack_signs(-torch.ones(3, count)).numpy(), count)
    for bit in range(count % width, width) if count % width else ():
        pad = (1 << bit) - ((1 << width) if bit == width - 1 and dtype.is_signed else 0)
        damaged = words.copy()
        damaged[1, number - 1] |= pad
        assert has_pad_bits(damaged, count)
