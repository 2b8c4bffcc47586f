"""Test quantize_, save, load and info on a small random Llama, with real files."""

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path

import littlebit.fast as lb
import numpy as np
import pytest
import torch
from compare import assert_same, assert_within
from hypothesis import given, strategies as st
from littlebit.fast.bench.linear import random_path
from littlebit.fast.checkpoints.format import NO_CHECKSUMS
from littlebit.fast.checkpoints.saving import write_tensors
from littlebit.fast.files import atomic
from littlebit.fast.models.layers import LittleBitLinear, PackedLinear, packed_shapes
from littlebit.fast.models.quantize import packed_layers
from safetensors.torch import load_file, save_file
from test_decode import exact_and_condition

BITS = 2.5  # the layers are tiny: their scales alone take a bit and a half


@pytest.fixture
def quantised(tiny_llama):
    model = lb.load_model(tiny_llama)
    lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    return model


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, tmp_path_factory):
    model = lb.load_model(tiny_llama)
    lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    return lb.save(model, tmp_path_factory.mktemp("saved") / "out", lb.load_tokenizer(tiny_llama), bits=BITS)


@pytest.fixture
def copied(checkpoint, tmp_path):
    return without_checksums(shutil.copytree(checkpoint, tmp_path / "copy"))


def logits(model):
    tokens = torch.arange(24)[None] % 256
    with torch.inference_mode():
        return model(tokens).logits


def test_quantize_replaces_all_linear_layers_but_the_head(tiny_llama):
    model = lb.load_model(tiny_llama)
    dense = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    results = lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    assert set(results) == set(dense) - {"lm_head"}
    assert isinstance(model.lm_head, torch.nn.Linear)
    for name, result in results.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, LittleBitLinear)
        assert layer.ranks == result.ranks
        weight = dense[name].weight.detach().double()
        paths = [lb.Factors(*(tensor.detach().double() for tensor in path)) for path in layer.factors()]
        error = (weight - sum(path.to_dense() for path in paths)).norm() / weight.norm()
        sizes = sum(torch.outer(path.h.abs(), path.g.abs()) * path.ell.abs().sum() for path in paths)
        # an entry of the rest sees the roundings of its ranks and a few more, a norm half as many as it has entries
        magnitude = (sum(layer.ranks) + 8) * sizes.norm() / weight.norm() + weight.numel() * error
        assert_within(np.float32(result.error), error, magnitude, terms=1)
        assert_same(layer.bias is None, dense[name].bias is None)


def test_quantize_is_deterministic(tiny_llama):
    models = [lb.load_model(tiny_llama) for _ in range(2)]
    for model in models:
        lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    for mine, theirs in zip(*(model.state_dict().values() for model in models), strict=True):
        assert_same(mine, theirs)


def test_quantize_honours_include_and_exclude(tiny_llama):
    model = lb.load_model(tiny_llama)
    config = lb.Config(bits=BITS, include=("*.mlp.*",), exclude=("*down_proj",))
    assert {name.split(".")[-1] for name in lb.quantize_(model, config, progress=False)} == {"gate_proj", "up_proj"}


def test_quantize_leaves_a_head_of_any_name():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.embed_out = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

        def get_output_embeddings(self):
            return self.embed_out

    assert set(lb.quantize_(Model(), lb.Config(bits=BITS), progress=False)) == {"body"}


def test_quantize_names_the_layer_with_nan_and_changes_nothing(tiny_llama):
    model = lb.load_model(tiny_llama)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"layer model\.layers\.1\.mlp\.up_proj: the weight holds NaN"):
        lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    assert not any(isinstance(module, LittleBitLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lb.Config(bits=0.1), "smallest possible value is"),
        (lb.Config(bits=-1), "bits must be a finite number > 0, got -1"),
        (lb.Config(bits=BITS, paths=0), "paths must be"),
        (lb.Config(bits=BITS, init="magic"), "init must be"),
        (lb.Config(bits=BITS, include=("nothing*",)), "no linear layer matches"),
    ],
)
def test_quantize_refuses_what_cannot_be_done(tiny_llama, config, message):
    model = lb.load_model(tiny_llama)
    with pytest.raises(ValueError, match=message):
        lb.quantize_(model, config, progress=False)
    assert not any(isinstance(module, LittleBitLinear) for module in model.modules())


def test_packed_model_equals_training_form(quantised):
    """The same function, once the scales are rounded to float16 in both: each a few roundings from float64's."""
    for module in quantised.modules():
        if isinstance(module, LittleBitLinear):
            for tensor in (*(scale for path in module.factors() for scale in path[2:]), module.bias):
                if tensor is not None:
                    tensor.data = tensor.data.half().float()
    trained = logits(quantised)[0, -1]
    lb.pack_(quantised)
    assert not any(isinstance(module, LittleBitLinear) for module in quantised.modules())
    exact, moved = exact_and_condition(quantised, torch.arange(24) % 256)
    terms = 64 + sum(layer.d_in + sum(layer.ranks) + 24 for layer in packed_layers(quantised).values())
    for mine in (trained, logits(quantised)[0, -1]):
        assert_within(mine, exact, moved, terms)


def test_save_load_is_exact_bit_for_bit(quantised, tmp_path):
    path = lb.save(quantised, tmp_path / "out")
    loaded = lb.load(path)
    assert all(isinstance(module, PackedLinear) for module in packed_layers(loaded).values())
    for name, layer in packed_layers(quantised).items():
        for mine, theirs in zip(packed_layers(loaded)[name].factors(), layer.factors(), strict=True):
            for left, right in zip(mine, theirs, strict=True):
                assert_same(left, right)
    again = lb.save(loaded, tmp_path / "again")
    first, second = load_file(path / "model.safetensors"), load_file(again / "model.safetensors")
    assert first.keys() == second.keys()
    for name in first:
        assert_same(first[name], second[name])
    half = lb.load(again)
    assert_same(logits(loaded), logits(half))


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40))
def test_packed_shapes_are_those_of_packed_factors(d_out, d_in, rank):
    path = random_path(d_out, d_in, rank, torch.Generator().manual_seed(0))
    packed = lb.pack_factors(lb.unpack_factors(path))
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in packed._asdict().items()}
    assert found == packed_shapes(d_out, d_in, rank)
    empty = PackedLinear.empty(d_out, d_in, (rank,)).factors()[0]
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in empty._asdict().items()} == found


@pytest.mark.parametrize(("bits", "paths", "hidden", "inner"), [(0.9, 1, 64, 96), (1.5, 2, 64, 96), (6.0, 1, 16, 8)])
def test_save_load_is_exact_with_narrow_words(bits, paths, hidden, inner, tmp_path):
    from conftest import make_tiny_llama

    model = lb.load_model(make_tiny_llama(tmp_path / "tiny", hidden_size=hidden, intermediate_size=inner))
    lb.quantize_(model, lb.Config(bits=bits, paths=paths), progress=False)
    path = lb.save(model, tmp_path / "out")
    loaded = lb.load(path)
    assert_same(logits(loaded), logits(lb.load(lb.save(loaded, tmp_path / "again"))))
    found = packed_layers(loaded)
    for name, layer in packed_layers(model).items():
        for mine, theirs in zip(found[name].factors(), layer.factors(), strict=True):
            for left, right in zip(mine, theirs, strict=True):
                assert_same(left, right)
    words = {words.dtype for layer in found.values() for each in layer.factors() for words in each[:2]}
    assert words & {torch.uint8, torch.int16}  # the case that is looked at
    accounted = sum(lb.layer_bits(layer.d_out, layer.d_in, layer.ranks) for layer in found.values())
    assert accounted == 8 * lb.info(path)["linear_bytes"]


@pytest.fixture(scope="module")
def with_codes(tmp_path_factory):
    """A checkpoint with 8-bit scales, and the model that it was saved from."""
    from conftest import make_tiny_llama

    folder = tmp_path_factory.mktemp("codes")
    model = lb.load_model(make_tiny_llama(folder / "tiny"))
    results = lb.quantize_(model, lb.Config(bits=BITS, scale_bits=8), progress=False)
    return lb.save(model, folder / "out"), model, results


def test_scales_of_8_bits_survive_saving_and_loading(with_codes, tmp_path):
    path, model, results = with_codes
    loaded = lb.load(path)
    found, stored = packed_layers(loaded), lb.info(path)
    for name, layer in packed_layers(model).items():
        for mine, theirs in zip(found[name].factors(), layer.factors(), strict=True):
            for left, right in zip(mine, theirs, strict=True):
                assert_same(left, right)
            assert mine.h.dtype == torch.float16  # in memory
    accounted = sum(lb.layer_bits(layer.d_out, layer.d_in, layer.ranks, 8) for layer in found.values())
    weights = sum(row.d_out * row.d_in for row in results.values())
    assert accounted == 8 * stored["linear_bytes"]
    assert accounted == round(sum(row.bits * row.d_out * row.d_in for row in results.values()))
    assert accounted <= BITS * weights
    again = lb.save(loaded, tmp_path / "again")
    for name, tensor in load_file(path / "model.safetensors").items():
        assert_same(load_file(again / "model.safetensors")[name], tensor)
    other = lb.load(path)
    other.load_state_dict(loaded.state_dict())  # codes into a layer that holds scales
    assert_same(logits(other), logits(loaded))
    assert_same(logits(copy.deepcopy(loaded)), logits(loaded))


def test_scales_of_8_bits_are_the_same_whatever_reads_them(with_codes, tmp_path):
    from littlebit.conformance.checkpoint import read_layers
    from littlebit.fast.decoding.cpu_decoder import Decoder
    from littlebit.fast.decoding.mapped_weights import map_model
    from littlebit.fast.decoding.torch_weights import decodable
    from transformers import AutoModelForCausalLM

    path, _, _ = with_codes
    loaded = lb.load(path)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert_same(logits(theirs), logits(loaded))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(logits(lb.load(tmp_path / "theirs")), logits(loaded))
    layers = packed_layers(loaded)
    for name, (paths, _) in read_layers(path).items():  # written from the specification alone
        for mine, written in zip(layers[name].factors(), paths, strict=True):
            for field in ("h", "ell", "g"):
                assert_same(getattr(mine, field), getattr(written, field))
    tokens = np.arange(24)
    assert_same(Decoder(map_model(path), 24)(tokens), Decoder(decodable(loaded), 24)(tokens))


def test_load_allocates_no_dense_weight_and_keeps_ties(checkpoint):
    model = lb.load(checkpoint)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(checkpoint / "model.safetensors")
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert linears == ["lm_head"]


def test_load_gives_the_dtype_asked_for(checkpoint):
    model = lb.load(checkpoint, dtype=torch.bfloat16)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert all(path.h.dtype == torch.float16 for layer in packed_layers(model).values() for path in layer.factors())
    assert logits(model).dtype == torch.bfloat16


def test_untied_model_keeps_its_head(tmp_path):
    from conftest import make_tiny_llama

    source = make_tiny_llama(tmp_path / "untied", tie_word_embeddings=False)
    model = lb.load_model(source)
    lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    loaded = lb.load(lb.save(model, tmp_path / "out"))
    assert_same(loaded.lm_head.weight, model.lm_head.weight.half().float())
    assert_same(logits(loaded), logits(lb.load(tmp_path / "out")))


def test_info_counts_what_lies_on_disk(checkpoint):
    stored = lb.info(checkpoint)
    layers = packed_layers(lb.load(checkpoint))
    tensors = load_file(checkpoint / "model.safetensors")
    linear = [name for name in tensors if ".paths." in name]
    assert stored["linear_bytes"] == sum(tensors[name].numel() * tensors[name].element_size() for name in linear)
    assert stored["file_bytes"] == os.path.getsize(checkpoint / "model.safetensors")
    weights = sum(layer.d_out * layer.d_in for layer in layers.values())
    accounted = sum(lb.layer_bits(layer.d_out, layer.d_in, layer.ranks) for layer in layers.values())
    assert accounted == 8 * stored["linear_bytes"]
    assert stored["bits_per_weight"] == accounted / weights <= BITS == stored["target_bits"]
    assert stored["layers"] == len(layers) == 14
    with open(checkpoint / "model.safetensors", "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    assert 8 + header + sum(t.numel() * t.element_size() for t in tensors.values()) == stored["file_bytes"]
    described = 8 + header + os.path.getsize(checkpoint / "config.json")
    assert stored["description_bytes"] == described
    assert stored["described_bits_per_weight"] == (accounted + 8 * described) / weights


def edit_config(path, change):
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def rewrite(path, change, name="model.safetensors"):
    tensors = load_file(path / name)
    change(tensors)
    save_file(tensors, path / name, metadata={"format": "pt"})


def without_checksums(path):
    """A checkpoint in the format that has no checksums, which would notice any damage before other checks do."""
    edit_config(path, lambda config: config["quantization_config"].update(format_version=NO_CHECKSUMS))
    for file in path.glob("*.safetensors"):
        rewrite(path, lambda tensors: None, file.name)
    return path


LAYER = "model.layers.0.mlp.up_proj"
PADDED = "model.layers.0.mlp.down_proj.paths.1.u_words"  # of rank 20
NARROW = "model.layers.0.self_attn.k_proj.paths.0.u_words"  # of a rank between 1 and 16


DAMAGES = [
    (lambda path: (path / "config.json").unlink(), "no config.json"),
    (lambda path: (path / "config.json").write_text("{"), "config.json is damaged"),
    (lambda path: (path / "model.safetensors").unlink(), "no model.safetensors"),
    (lambda path: os.truncate(path / "model.safetensors", 5000), "damaged or incomplete"),
    (lambda path: os.truncate(path / "model.safetensors", 4), "damaged or incomplete"),
    (lambda path: (path / "model.safetensors").write_bytes(b""), "damaged or incomplete"),
    (lambda path: edit_config(path, lambda c: c.pop("quantization_config")), "describes a dense model"),
    (
        lambda path: edit_config(path, lambda c: c["quantization_config"].update(format_version=99)),
        "format_version",
    ),
    (lambda path: edit_config(path, lambda c: c["quantization_config"].update(quant_method="x")), "quant_method"),
    (lambda path: edit_config(path, lambda c: c["quantization_config"].update(layers={})), "at least one layer"),
    (lambda path: edit_config(path, lambda c: c["quantization_config"]["layers"][LAYER].update(ranks=[0])), LAYER),
    (lambda path: edit_config(path, lambda c: c["quantization_config"]["layers"][LAYER].update(ranks=[5])), LAYER),
    (
        lambda path: edit_config(path, lambda c: c["quantization_config"]["layers"][LAYER].update(d_in=10**15)),
        LAYER,
    ),
    (lambda path: edit_config(path, lambda c: c["quantization_config"]["layers"].pop(LAYER)), "does not fit"),
    (lambda path: edit_config(path, lambda c: c.update(model_type="unheard-of")), "unheard-of"),
    (lambda path: edit_config(path, lambda c: c.update(hidden_size=32)), "config.json packs"),
    (lambda path: edit_config(path, lambda c: c.update(vocab_size=100)), "does not describe a model"),
    (lambda path: edit_config(path, lambda c: c.update(vocab_size=300)), "does not fit"),
    (lambda path: rewrite(path, lambda t: t.pop(f"{LAYER}.paths.0.h")), LAYER),
    (lambda path: rewrite(path, lambda t: t.update({f"{LAYER}.paths.0.h": torch.zeros(96)})), LAYER),
    (lambda path: rewrite(path, lambda t: t.update({NARROW: t[NARROW].int()})), "another version of littlebit"),
    (lambda path: rewrite(path, lambda t: t.update({NARROW: t[NARROW].view(torch.uint8)})), " U8, but"),
    (lambda path: rewrite(path, lambda t: t.update(extra=torch.zeros(1))), "left over"),
    (lambda path: rewrite(path, lambda t: t[PADDED].fill_(-1)), "a pad bit is set"),
    (lambda path: rewrite(path, lambda t: t[f"{LAYER}.paths.0.ell"].fill_(torch.inf)), "NaN or infinity"),
    (lambda path: rewrite(path, lambda t: t.pop("model.norm.weight")), "missing"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_load_refuses_damaged_checkpoints(copied, damage, message):
    damage(copied)
    with pytest.raises(lb.CheckpointError, match=message):
        lb.load(copied)


def test_save_refuses_to_replace_what_is_not_its_own(quantised, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not a LittleBit checkpoint"):
        lb.save(quantised, tmp_path / "precious", overwrite=True)
    path = lb.save(quantised, tmp_path / "out")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        lb.save(quantised, path)
    lb.save(quantised, path, overwrite=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "precious"]


def test_save_leaves_nothing_when_the_disk_is_full(quantised, tmp_path, monkeypatch):
    import errno

    from littlebit.fast.checkpoints import saving

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*out: No space left on device; nothing was left there"):
        lb.save(quantised, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=9))
def test_the_same_tensors_are_the_same_bytes(name):
    """The metadata are a hash map to safetensors, which writes it in any order."""
    tensors, written = {name: torch.arange(3), "other": torch.ones(2, dtype=torch.int8)}, set()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(9):
            write_tensors(tensors, Path(folder), config={})
            written.add((Path(folder) / "model.safetensors").read_bytes())
        found = load_file(Path(folder) / "model.safetensors")
    assert len(written) == 1
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert_same(found[key], tensor)


def test_save_gives_back_the_old_checkpoint_if_the_new_one_cannot_take_its_place(quantised, tmp_path, monkeypatch):
    path = lb.save(quantised, tmp_path / "out")
    before = (path / "model.safetensors").read_bytes()
    monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    rename, calls = os.rename, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output error"):
        lb.save(quantised, path, overwrite=True)
    assert (path / "model.safetensors").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_save_names_an_output_that_cannot_be_written(quantised, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose a folder that can be written"):
        lb.save(quantised, tmp_path / "file" / "out")


def test_save_refuses_a_dense_model(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="call quantize_ first"):
        lb.save(lb.load_model(tiny_llama), tmp_path / "out")


def test_pack_names_the_layer_with_a_broken_latent(quantised):
    quantised.get_submodule(LAYER).paths[0].u.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=LAYER):
        lb.pack_(quantised)
    assert any(isinstance(module, LittleBitLinear) for module in quantised.modules())


def test_generate_is_greedy_or_seeded(checkpoint):
    model = lb.load(checkpoint)
    assert lb.generate(model, "abc", 12) == lb.generate(model, "abc", 12)
    state = torch.get_rng_state()
    samples = [lb.generate(model, "abc", 12, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]
    assert_same(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="prompt is empty"):
        lb.generate(model, "")
    with pytest.raises(ValueError, match="max_new_tokens"):
        lb.generate(model, "abc", 0)


def test_perplexity_is_what_it_says(tiny_llama):
    model = lb.load_model(tiny_llama)
    tokens = torch.arange(50) % 256
    result = lb.perplexity(model, tokens, window=16, progress=False)
    assert (result.windows, result.window, result.scored) == (3, 16, 45)
    losses, sizes = [], []
    with torch.inference_mode():
        for start in (0, 16, 32):
            found = model(tokens[None, start : start + 15]).logits[0].double()  # what the last token follows from
            scores = torch.log_softmax(found, -1)
            losses += [-float(scores[at, tokens[start + at + 1]]) for at in range(15)]
            sizes += (1 + 2 * found.abs().amax(-1) + np.log(260)).tolist()
    # a loss of float32 is off by the roundings of a sum over the vocabulary, relative to its terms: see test_distill.py
    off = (16 + 260) * torch.finfo(torch.float32).eps * np.mean(sizes)
    assert abs(np.log(result.perplexity) - np.mean(losses)) <= off
    assert lb.perplexity(model, tokens[:5], window=16, progress=False).scored == 4
    assert lb.perplexity(model, tokens, window=16, max_windows=2, progress=False).windows == 2
    with pytest.raises(ValueError, match="at least 2 tokens are needed, got 1"):
        lb.perplexity(model, tokens[:1])


def test_divergence_is_what_it_says(tiny_llama):
    original = lb.load_model(tiny_llama)
    model = copy.deepcopy(original)
    lb.quantize_(model, lb.Config(bits=2.0), progress=False)
    tokens = torch.arange(50) % 256
    result = lb.divergence(model, original, tokens, window=16, max_windows=2, progress=False)
    with torch.inference_mode():
        heads = [
            torch.stack([each(part[None, :-1]).logits[0] for part in tokens.split(16)[:2]])
            for each in (original, model)
        ]
    p, q = (torch.log_softmax(each.double(), -1) for each in heads)
    assert result.kl == pytest.approx(
        (p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3, abs=3e-7
    )  # float32 rounds log-probabilities by 1e-7
    assert result.same_top == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    alone = [lb.perplexity(each, tokens, 16, 2, progress=False) for each in (model, original)]
    assert (result.perplexity, result.original_perplexity) == (alone[0].perplexity, alone[1].perplexity)
    assert result[4:] == alone[0][1:]
    same = lb.divergence(original, original, tokens, window=16, progress=False)
    assert (same.kl, same.same_top) == (0, 1)


def test_perplexity_of_uniform_logits_is_the_vocabulary():
    class Uniform(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens, use_cache):
            from types import SimpleNamespace

            return SimpleNamespace(logits=torch.zeros(*tokens.shape, 77))

    result = lb.perplexity(Uniform(), torch.arange(40), window=10, progress=False)
    off = 2 * torch.finfo(torch.float32).eps * np.log(77)  # of a loss: its logarithm, and a difference
    assert abs(np.log(result.perplexity) - np.log(77)) <= off
