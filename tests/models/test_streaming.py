"""Test quantization of models whose weights stay in their files: loading, and finished layers."""

import dataclasses

import littlebit.fast as lb
import pytest
import torch
from compare import assert_same
from littlebit.fast.checkpoints.mapped_model import load_mapped
from littlebit.fast.files.mapped import release_pages
from littlebit.fast.memory import MODEL_SHAPES, model_memory
from littlebit.fast.models import quantize
from littlebit.fast.models.build import empty_model
from littlebit.fast.models.layer_store import LayerStore
from littlebit.fast.models.published import published_config

TOKENS = torch.arange(64) * 7 % 256


@pytest.fixture(scope="module")
def half_llama(tiny_llama, tmp_path_factory):
    """Store the tiny model in bfloat16, in several files."""
    folder = tmp_path_factory.mktemp("mapped") / "half"
    lb.load_model(tiny_llama, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    return folder


def test_load_mapped_gives_the_stored_weights(half_llama):
    assert len(list(half_llama.glob("*.safetensors"))) > 1
    mapped, expected = load_mapped(half_llama), lb.load_model(half_llama, dtype=torch.bfloat16)
    release_pages()
    assert mapped.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert_same(mapped.get_parameter(name).view(torch.int16), tensor.view(torch.int16))
    assert mapped.config.to_dict().keys() == expected.config.to_dict().keys()
    assert mapped.generation_config.to_dict() == expected.generation_config.to_dict()


@pytest.mark.parametrize("scale_bits", [16, 8])
def test_quantize_with_a_store_gives_the_same_layers_and_makes_no_batch_twice(
    scale_bits, half_llama, tmp_path, monkeypatch
):
    config = lb.Config(bits=2.0, init="admm", importance=True, scale_bits=scale_bits)
    store = LayerStore(tmp_path / "layers")
    whole = lb.load_model(half_llama)
    expected = lb.quantize_(whole, config, TOKENS, progress=False)
    lb.pack_(whole)
    made = []
    factorize = quantize.factorize
    monkeypatch.setattr(
        quantize, "factorize", lambda weights, *rest: made.append(len(weights)) or factorize(weights, *rest)
    )
    for least, most in ((len(expected), len(expected)), (1, len(expected) - 1), (0, 0)):
        model = load_mapped(half_llama)
        results = lb.quantize_(model, config, TOKENS, progress=False, store=store)
        assert least <= sum(made) <= most
        assert results == expected
        packed = {name: tensor for name, tensor in model.state_dict().items() if ".paths." in name}
        assert packed
        for name, tensor in packed.items():
            assert_same(tensor, whole.state_dict()[name])
        made.clear()
        if least > 1:  # a file that a full disk or a killed process cut short is not believed
            damaged = next(store.folder.iterdir())
            damaged.write_bytes(damaged.read_bytes()[:100])
    other = dataclasses.replace(config, importance=False, scale_bits=24 - scale_bits)
    lb.quantize_(load_mapped(half_llama), other, progress=False, store=store)
    assert sum(made) == len(expected)


@pytest.mark.parametrize("name", MODEL_SHAPES)
def test_published_config_has_the_parameters_of_the_shape(name):
    with torch.device("meta"):
        model = empty_model(published_config(name, layers=2))
    model.tie_weights()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 2 * count == model_memory(MODEL_SHAPES[name]._replace(layers=2)).weights
