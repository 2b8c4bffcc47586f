"""Test reading the authors' format from files that NumPy writes by its description, and writing it."""

import json
import subprocess
import sys
import warnings

import littlebit.fast as lb
import numpy as np
import pytest
import torch
from compare import assert_same, assert_within
from conftest import make_tiny_llama
from littlebit.fast.checkpoints.format import OFFICIAL, WEIGHTS, read_headers, weight_files
from littlebit.fast.checkpoints.official import kv_factor
from littlebit.fast.cli.main import main
from littlebit.fast.models.quantize import packed_layers
from safetensors.numpy import load_file as load_arrays, save_file as save_arrays
from safetensors.torch import load_file, save_file
from test_decode import exact_and_condition
from transformers import LlamaForCausalLM

TOKENS = torch.arange(24)[None] % 256
LAYER = "model.layers.0.mlp.up_proj"
RANKS = {"q_proj": (24, 8), "k_proj": (8, 8), "v_proj": (16,), "o_proj": (32, 8), "up_proj": (40, 8)}
RANKS |= {"gate_proj": (8,), "down_proj": (33, 5)}


def logits(model):
    with torch.inference_mode():
        return model(TOKENS).logits


def words(signs, rng):
    """Pack rows into 32-bit words, least significant bit first, bit 1 for -1, with random pad bits."""
    rows, count = signs.shape
    bits = rng.integers(0, 2, (rows, -(-count // 32) * 32)).astype(np.uint8)
    bits[:, :count] = signs < 0
    return np.packbits(bits, axis=-1, bitorder="little").view("<u4").view(np.int32)


def write_official(source, out, packed=True, swapped=False, suffix_last=False):
    """Write a checkpoint by the description in official.py; return the dense float64 model that it represents."""
    rng = np.random.default_rng(0)
    dense = LlamaForCausalLM.from_pretrained(source).double()
    tensors = {name: tensor.numpy() for name, tensor in load_file(source / "model.safetensors").items()}
    for name, module in list(dense.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        d_out, d_in = module.weight.shape
        weight = np.zeros((d_out, d_in))
        del tensors[f"{name}.weight"]
        for suffix, rank in zip(("", "_R"), RANKS[name.split(".")[-1]], strict=False):
            u, v = rng.standard_normal((d_out, rank)), rng.standard_normal((rank, d_in))
            scales = {"u1": (d_out, 0.3), "u2": (rank, 1.0), "v1": (rank, 1.0), "v2": (d_in, 0.3)}
            scales = {key: np.float16(size * rng.uniform(0.5, 1, count)) for key, (count, size) in scales.items()}
            h, ell_u, ell_v, g = (scales[key].astype(np.float64) for key in ("u1", "u2", "v1", "v2"))
            weight += (h[:, None] * np.sign(u) * ell_u * ell_v) @ (np.sign(v) * g)
            if swapped:
                scales = {{"u1": "u2", "u2": "u1", "v1": "v2", "v2": "v1"}[key]: each for key, each in scales.items()}
            for key, each in scales.items():
                tensors[f"{name}.{key}{suffix}"] = each[None]
            for key, latent in {"U": u, "V": v}.items():
                if packed:
                    stem = f"{name}.{key}" + ("_packed" + suffix if suffix_last else suffix + "_packed")
                    tensors[stem] = words(latent, rng)
                    tensors[stem.replace("_packed", "_shape")] = np.array(latent.shape)
                else:
                    tensors[f"{name}.{key}{suffix}"] = latent.astype(np.float32)
        module.weight.data = torch.from_numpy(weight)
    out.mkdir()
    save_arrays(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / OFFICIAL).write_text(json.dumps({"eff_bit": 3.5, "residual": True}))
    (out / "config.json").write_text((source / "config.json").read_text())
    for file in source.glob("tokenizer*"):
        (out / file.name).write_text(file.read_text())
    return dense


VARIANTS = [{}, {"packed": False}, {"swapped": True}, {"suffix_last": True}]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_load_reads_the_authors_format(variant, tiny_llama, tmp_path):
    dense = write_official(tiny_llama, tmp_path / "official", **variant)
    model = lb.load(tmp_path / "official")
    for name, layer in packed_layers(model).items():
        weight = dense.get_submodule(name).weight.detach()
        # ell = u2 * v1 is rounded to float16, once: 2^-11 of each rank's share, and of nothing else
        share = sum(
            torch.outer(path.h.double().abs(), path.g.double().abs()) * path.ell.double().abs().sum()
            for path in layer.factors()
        )
        exact = sum(lb.Factors(*(t.double() for t in lb.unpack_factors(path))).to_dense() for path in layer.factors())
        assert ((exact - weight).abs() <= 2**-11 * share * (1 + 2**-10)).all(), name
        dense.get_submodule(name).weight.data = exact
        if layer.bias is not None:
            assert_same(layer.bias, dense.get_submodule(name).bias.half())
            dense.get_submodule(name).bias.data = layer.bias.double()
    exact, moved = exact_and_condition(model, TOKENS[0])
    assert_within(logits(dense)[0, -1], exact, moved, terms=64)  # float64: it is the model that was written
    terms = 64 + sum(layer.d_in + sum(layer.ranks) + 24 for layer in packed_layers(model).values())
    assert_within(logits(model)[0, -1], exact, moved, terms)
    assert lb.generate(model, "abc", 4) == lb.generate(model, "abc", 4)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_info_counts_the_authors_format(variant, tiny_llama, tmp_path):
    write_official(tiny_llama, tmp_path / "official", **variant)
    stored = lb.info(tmp_path / "official")
    arrays = load_arrays(tmp_path / "official" / "model.safetensors")
    own = [each for key, each in arrays.items() if "_proj." in key and not key.endswith("bias")]
    assert stored["linear_bytes"] == sum(each.nbytes for each in own)
    assert stored["other_bytes"] == sum(each.nbytes for each in arrays.values()) - stored["linear_bytes"]
    assert stored["weights"] == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    assert (stored["layers"], stored["target_bits"], stored["format"]) == (14, 3.5, "official")


def test_export_gives_back_every_bit(tiny_llama, tmp_path):
    """The command exports and imports in fresh processes; a 32-bit word holds a narrow word's bits."""
    write_official(tiny_llama, tmp_path / "official", packed=False)
    model = lb.load(tmp_path / "official")
    ours = lb.save(model, tmp_path / "ours", lb.load_tokenizer(tiny_llama), bits=3.5)
    command = [sys.executable, "-m", "littlebit.fast", "export", ours, tmp_path / "back", "--to", "official"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "bits per weight stored in 14 layers" in done.stdout
    headers = read_headers(weight_files(tmp_path / "back"))
    assert {header.dtype for name, header in headers.items() if name.endswith("_packed")} == {"I32"}
    arrays = load_arrays(tmp_path / "back" / "model.safetensors")
    latents = load_arrays(tmp_path / "official" / "model.safetensors")
    for name, array in arrays.items():
        if name.endswith("_packed"):
            latent = latents[name.removesuffix("_packed")]
            assert_same(arrays[name.replace("_packed", "_shape")], np.array(latent.shape))
            padded = np.zeros((len(latent), array.shape[1] * 32), np.uint8)
            padded[:, : latent.shape[1]] = latent < 0
            assert_same(array, np.packbits(padded, axis=-1, bitorder="little").view(np.int32))
    again = lb.load(tmp_path / "back")
    assert_same(logits(again), logits(lb.load(ours)))
    assert json.loads((tmp_path / "back" / OFFICIAL).read_text())["eff_bit"] == 3.5


def test_export_refuses_what_the_format_does_not_hold(tiny_llama, tmp_path):
    from littlebit.fast.models.embeddings import quantize_embeddings_

    model = lb.load_model(tiny_llama)
    with pytest.raises(ValueError, match="call quantize_ first"):
        lb.save_official(model, tmp_path / "out")
    lb.quantize_(model, lb.Config(bits=4.5, paths=3), progress=False)
    with pytest.raises(ValueError, match=r"two paths at most, but .* has 3"):
        lb.save_official(model, tmp_path / "out")
    quantize_embeddings_(model, 8)
    with pytest.raises(ValueError, match="no quantized embeddings"):
        lb.save_official(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("save", [lb.save, lb.save_official])
def test_save_takes_transformers_models_only(save, tmp_path):
    with pytest.raises(ValueError, match="save writes transformers models; for another module"):
        save(torch.nn.Linear(2, 2), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def rewritten(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: rewritten(p, lambda t: t.pop(f"{LAYER}.V_packed")), f"{LAYER}.V_packed is missing"),
        (lambda p: rewritten(p, lambda t: t.pop(f"{LAYER}.U_R_shape")), f"{LAYER}.U_R_shape is missing"),
        (lambda p: rewritten(p, lambda t: t.pop(f"{LAYER}.u1")), f"{LAYER}.u1 is missing"),
        (lambda p: rewritten(p, lambda t: t.update({f"{LAYER}.v2": torch.ones(63)})), "must fit each other"),
        (lambda p: rewritten(p, lambda t: t.update({f"{LAYER}.U_shape": torch.tensor([96, 70])})), "96 rows of 70"),
        (lambda p: rewritten(p, lambda t: t.update({f"{LAYER}.u1": torch.full((96,), 1e6)})), "does not fit float16"),
        (lambda p: rewritten(p, lambda t: [t.pop(k) for k in list(t) if "_proj." in k]), "must hold a quantized layer"),
        (lambda p: (p / OFFICIAL).write_text("["), "is damaged"),
        (lambda p: (p / "config.json").unlink(), "no config.json"),
        (lambda p: (p / "model.safetensors").unlink(), "no model.safetensors"),
    ],
)
def test_load_refuses_damaged_files_of_the_authors_format(damage, message, tiny_llama, tmp_path):
    write_official(tiny_llama, tmp_path / "official")
    damage(tmp_path / "official")
    with pytest.raises(ValueError, match=message):
        lb.load(tmp_path / "official")


def test_load_model_does_not_take_the_authors_format_for_a_dense_model(tiny_llama, tmp_path):
    write_official(tiny_llama, tmp_path / "official")
    with pytest.raises(ValueError, match="already quantised"):
        lb.load_model(tmp_path / "official")


def test_untied_head_and_ranks_of_whole_words(tmp_path):
    source = make_tiny_llama(tmp_path / "untied", tie_word_embeddings=False)
    model = lb.load_model(source)
    lb.quantize_(model, lb.Config(bits=3, paths=1), progress=False)
    with pytest.warns(UserWarning, match="computes ranks"):
        lb.save_official(model, tmp_path / "out")
    assert_same(logits(lb.load(tmp_path / "out")), logits(lb.load(lb.save(model, tmp_path / "ours"))))


@pytest.mark.parametrize("paths", [1, 2])
def test_official_ranks_are_exported_without_a_warning_and_others_with_one(paths, tiny_llama, tmp_path):
    """The ranks that the authors' loader computes from the bits per weight equal those that are stored."""
    made = {}
    for allocation in ("official", "uniform"):
        model = made[allocation] = lb.load_model(tiny_llama)
        config = lb.Config(bits=1.4 * paths, paths=paths, allocation=allocation)
        lb.quantize_(model, config, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lb.save_official(made["official"], tmp_path / "official", bits=1.4 * paths)
    with pytest.warns(UserWarning, match=r"will not load this checkpoint: layer model\.layers\.0"):
        lb.save_official(made["uniform"], tmp_path / "uniform", bits=1.4 * paths)
    note, tensors = (
        json.loads((tmp_path / "official" / OFFICIAL).read_text()),
        load_file(tmp_path / "official" / WEIGHTS),
    )
    for name, layer in packed_layers(made["official"]).items():
        a, b, count = layer.d_in, layer.d_out, 1 + note["residual"]
        rank = max(8, int((a * b * note["eff_bit"] - 16 * count * (a + b)) / (count * (a + b + 16))) // 8 * 8)
        for suffix in ("", "_R")[:count]:
            assert tensors[f"{name}.U{suffix}_shape"].tolist() == [b, rank]
            assert tensors[f"{name}.v1{suffix}"].shape == (1, rank)


def ranks_by_their_rule(note, name, d_out, d_in):
    """Compute the rank that the authors' loader gives a layer, from littlebit_config.json."""
    count = 1 + note["residual"]
    rank = (d_in * d_out * note["eff_bit"] - 16 * count * (d_in + d_out)) / (count * (d_in + d_out + 16))
    return max(8, int(rank * (note["kv_factor"] if name.endswith((".k_proj", ".v_proj")) else 1.0)) // 8 * 8)


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory):
    """Build a random Llama whose k_proj and v_proj ranks depend on kv_factor."""
    sizes = {"hidden_size": 192, "intermediate_size": 224, "num_hidden_layers": 1, "num_key_value_heads": 1}
    return make_tiny_llama(tmp_path_factory.mktemp("wide") / "llama", **sizes, num_attention_heads=2)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("paths", [1, 2])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5, 4.0])
def test_kv_factor_is_written_so_that_their_rule_gives_every_rank(factor, paths, packed, wide_llama, tmp_path):
    model, bits = lb.load_model(wide_llama), 0.6 * paths
    lb.quantize_(model, lb.Config(bits=bits, paths=paths, allocation="official", kv_rank_factor=factor), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lb.save_official(model, tmp_path / "out", bits=bits, packed=packed)
    note = json.loads((tmp_path / "out" / OFFICIAL).read_text())
    ranks = {name: layer.ranks for name, layer in packed_layers(model).items()}
    for name, layer in packed_layers(model).items():
        assert layer.ranks == (ranks_by_their_rule(note, name, layer.d_out, layer.d_in),) * paths
    assert ranks["model.layers.0.self_attn.v_proj"] == (lb.official_rank(96, 192, bits, paths, factor),) * paths
    again = lb.load(tmp_path / "out")
    assert_same(logits(again), logits(lb.load(lb.save(model, tmp_path / "ours"))))
    assert {name: layer.ranks for name, layer in packed_layers(again).items()} == ranks
    assert lb.info(tmp_path / "out")["kv_factor"] == note["kv_factor"]


@pytest.mark.parametrize("factor", [0.25, 1, 1.5, 4, 7 / 3])
@pytest.mark.parametrize("paths", [1, 2])
def test_kv_factor_is_found_from_ranks_alone(factor, paths):
    shapes = {"a.k_proj": (256, 1024), "a.v_proj": (512, 1024), "a.q_proj": (1024, 1024)}
    shapes["b.k_proj"] = (64, 128)  # of the least rank, 8, for most factors
    layers = {}
    for name, (d_out, d_in) in shapes.items():
        rank = lb.official_rank(d_out, d_in, 0.6, paths, factor if name != "a.q_proj" else 1)
        layers[name] = lb.PackedLinear.empty(d_out, d_in, (rank,) * paths)
    found = kv_factor(layers, 0.6, paths)
    for name in ("a.k_proj", "a.v_proj", "b.k_proj"):
        assert lb.official_rank(*shapes[name], 0.6, paths, found) == layers[name].ranks[0]
    if factor == 1:
        assert found == 1


def test_kv_factor_is_one_where_none_fits():
    """For ranks that no common factor gives, without a target, and without k_proj and v_proj."""
    shapes = {"a.k_proj": (256, 1024, 8), "a.v_proj": (256, 1024, 80)}
    layers = {name: lb.PackedLinear.empty(d_out, d_in, (rank,)) for name, (d_out, d_in, rank) in shapes.items()}
    assert kv_factor(layers, 0.6, 1) == kv_factor(layers, None, 1) == kv_factor({}, 0.6, 1) == 1


@pytest.mark.parametrize("factor", [0, -1, "4", True, float("inf"), None])
def test_load_refuses_a_kv_factor_that_is_no_positive_number(factor, tiny_llama, tmp_path):
    write_official(tiny_llama, tmp_path / "official")
    (tmp_path / "official" / OFFICIAL).write_text(json.dumps({"eff_bit": 3.5, "kv_factor": factor}))
    for read in (lb.load, lb.info):
        with pytest.raises(lb.CheckpointError, match="'kv_factor' must be a positive number"):
            read(tmp_path / "official")


def test_unpacked_export_holds_signs_alone(tiny_llama, tmp_path, capsys):
    model = lb.load_model(tiny_llama)
    lb.quantize_(model, lb.Config(bits=3, paths=2), progress=False)
    ours = lb.save(model, tmp_path / "ours", lb.load_tokenizer(tiny_llama))
    command = ["export", str(ours), str(tmp_path / "theirs"), "--to", "official", "--unpacked"]
    assert main(command) == 0
    assert "computes ranks" in capsys.readouterr().err
    tensors = load_file(tmp_path / "theirs" / WEIGHTS)
    assert not [name for name in tensors if "packed" in name or name.endswith("shape")]
    for name, layer in packed_layers(model).items():
        for suffix, path in zip(("", "_R"), layer.factors(), strict=True):
            factors = lb.unpack_factors(path)
            assert_same(tensors[f"{name}.U{suffix}"], factors.u.half())
            assert_same(tensors[f"{name}.V{suffix}"], factors.v.T.half())
    assert main(["export", str(ours), str(tmp_path / "x"), "--to", "gguf", "--unpacked"]) == 2


@pytest.mark.parametrize("factor", [4.0, 16.0])
def test_a_refused_model_is_left_as_it_was(factor, tiny_llama):
    """The ranks of all layers are checked before the first one is replaced: k_proj and v_proj come after q_proj."""
    model = lb.load_model(tiny_llama)
    before = {name: id(module) for name, module in model.named_modules()}
    config = lb.Config(bits=1.5, paths=1, allocation="official", kv_rank_factor=factor)
    with pytest.raises(ValueError, match=r"k_proj: allocation 'official' gives rank \d+, .* 32 at most"):
        lb.quantize_(model, config, progress=False)
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_official_allocation_needs_a_number_of_paths(tiny_llama):
    with pytest.raises(ValueError, match="choose paths=1 or 2"):
        lb.quantize_(lb.load_model(tiny_llama), lb.Config(paths=None, allocation="official"), progress=False)
