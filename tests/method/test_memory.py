"""Compare the memory of whole models with models that are built, and with published figures."""

import math
import re
import statistics

import littlebit.reference as ref
import pytest
import torch
from littlebit.fast.models.embeddings import EmbeddingTable, quantize_table
from littlebit.fast.models.layers import PackedLinear
from littlebit.fast.models.quantize import Config, replace_module, target_layers
from littlebit.reference.memory import activation_numbers, embedding_bytes, latent_widths, linear_shapes

GB = 1e9
# GB of weights in LittleBit, arXiv 2506.13771, EmbeddingTable 3
PUBLISHED_DENSE = {"llama2-7b": 13.49, "llama2-13b": 26.06, "llama2-70b": 138.04}
PUBLISHED = {("llama2-7b", 0.3): 0.79, ("llama2-7b", 0.1): 0.63, ("llama2-13b", 0.1): 0.84, ("llama2-70b", 0.1): 1.98}
# parameters in the files on the hub
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "opt-1.3b": 1_315_758_080,
    "llama-7b": 6_738_415_616,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "phi4-14b": 14_659_507_200,
    "qwq-32b": 32_763_876_352,
}
SIZES = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
GROUPED = {"intermediate_size": 160, "num_key_value_heads": 2}
OPT = {"ffn_dim": 160, "word_embed_proj_dim": 64}
BUILT = {
    "llama": ("LlamaConfig", GROUPED, {}),
    "tied": ("LlamaConfig", GROUPED | {"tie_word_embeddings": True}, {"tied": True}),
    "qwen2": ("Qwen2Config", GROUPED, {"biases": "qkv"}),
    "phi3": ("Phi3Config", GROUPED, {"fused": True}),
    "opt": ("OPTConfig", OPT, {"kv_heads": 4, "tied": True, "biases": "all", "gated": False, "positions": 34}),
}


def built(kind):
    """Build a small model without memory, and describe it as a ModelShape."""
    import transformers

    name, settings, changes = BUILT[kind]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**SIZES, **settings))
    sizes = {"hidden": 64, "intermediate": 160, "layers": 3, "heads": 4, "kv_heads": 2, "head_size": 16}
    return model, ref.ModelShape(kind, **(sizes | {"vocabulary": 300, "context": 32} | changes))


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_model_memory_counts_the_published_parameters(name):
    assert ref.model_memory(ref.MODEL_SHAPES[name]).weights == 2 * PARAMETERS[name]
    assert set(PARAMETERS) == set(ref.MODEL_SHAPES)


@pytest.mark.parametrize("kind", list(BUILT))
def test_model_memory_counts_what_a_dense_model_holds(kind):
    model, shape = built(kind)
    model.tie_weights()
    memory = ref.model_memory(shape)
    tables = {module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    linear = [layer.weight for _, layer in target_layers(model, Config())]
    assert memory.linear == 2 * sum(weight.numel() for weight in linear)
    assert memory.embeddings == 2 * sum(weight.numel() for weight in tables)
    assert memory.weights == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert (memory.kv_cache, memory.activations, memory.ranks) == (0, 0, {})
    found = sorted((layer.out_features, layer.in_features) for _, layer in target_layers(model, Config()))
    assert sorted(linear_shapes(shape).values()) == found


@pytest.mark.parametrize("kind", list(BUILT))
@pytest.mark.parametrize(("bits", "paths"), [(2.0, 1), (2.5, 2), (3.0, None)])
def test_model_memory_counts_what_a_packed_model_holds(kind, bits, paths):
    model, shape = built(kind)
    memory = ref.model_memory(shape, bits, paths)
    names = {"fc1": "up_proj", "fc2": "down_proj", "out_proj": "o_proj"}
    for name, layer in list(target_layers(model, Config())):
        number, last = re.findall(r"layers\.(\d+)\..*?(\w+)$", name)[0]
        ranks = memory.ranks[f"{number}.{names.get(last, last)}"]
        replace_module(model, name, PackedLinear.empty(layer.out_features, layer.in_features, ranks))
    packed = [path for layer in model.modules() if isinstance(layer, PackedLinear) for path in layer.paths]
    assert memory.linear == sum(buffer.nbytes for path in packed for buffer in path.buffers())
    assert memory.linear * 8 <= bits * sum(math.prod(size) for size in linear_shapes(shape).values())


@pytest.mark.parametrize(("rows", "size"), [(10, 64), (7, 96), (5, 192)])
def test_embedding_bytes_counts_what_an_embedding_holds(rows, size):
    assert embedding_bytes(rows, size) == torch.empty(rows, size, dtype=torch.float16, device="meta").nbytes
    for bits in (8, 4):
        quantised = quantize_table(torch.ones(rows, size), bits)
        assert isinstance(quantised, EmbeddingTable)
        assert embedding_bytes(rows, size, bits) == sum(buffer.nbytes for buffer in quantised.buffers())


@pytest.mark.parametrize("vocabulary", [50, 3000])
@pytest.mark.parametrize("intermediate", [16, 160])
def test_activation_numbers_counts_what_one_token_makes(vocabulary, intermediate):
    """Find the largest sum of inputs and outputs among the modules of attention, of an MLP and of the end."""
    import transformers

    sizes = SIZES | GROUPED | {"vocab_size": vocabulary, "intermediate_size": intermediate, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    made = {}

    def note(name):
        def hook(module, inputs, output):
            made[name] = inputs[0].numel(), output.numel()

        return hook

    for name, module in model.named_modules():
        if "norm" in name or name.endswith(("_proj", "lm_head")):
            module.register_forward_hook(note(name.split(".")[-1]))
    with torch.no_grad():
        model(torch.tensor([[5]]))
    attention = sum(made[name][1] for name in ("input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj"))
    mlp = sum(made[name][1] for name in ("post_attention_layernorm", "gate_proj", "up_proj", "down_proj"))
    end = made["norm"][1] + made["lm_head"][1]
    widest = max(attention + made["o_proj"][0], mlp + made["down_proj"][0], end)
    shape = ref.ModelShape("", 64, intermediate, 1, 4, 2, 16, vocabulary, 32)
    assert activation_numbers(shape) == made["input_layernorm"][0] + widest
    assert ref.model_memory(shape, context=3).activations == 2 * activation_numbers(shape)


@pytest.mark.parametrize(("name", "published"), PUBLISHED_DENSE.items())
def test_model_memory_gives_the_papers_float16_models(name, published):
    assert abs(ref.model_memory(ref.MODEL_SHAPES[name]).weights / GB / published - 1) < 0.0012


@pytest.mark.parametrize(("name", "bits"), PUBLISHED)
def test_model_memory_gives_the_papers_littlebit_models(name, bits):
    """Agree within 4 %, and within 2 % after adding what the paper's own float16 model has beyond its parameters."""
    shape, published = ref.MODEL_SHAPES[name], PUBLISHED[name, bits]
    beyond = PUBLISHED_DENSE[name] - ref.model_memory(shape).weights / GB
    for word_bits in (32, 1):
        ours = ref.model_memory(shape, bits, word_bits=word_bits).weights / GB
        assert 0.96 < ours / published < 1
        assert abs((ours + beyond) / published - 1) < 0.02


def test_latent_cache_of_llama2_7b_is_the_papers():
    """Reproduce EmbeddingTable 4: rank 192 at 0.1 bits, 21.3 times smaller.

    Most ranks here are 192, some a word less, and scales are counted too.
    """
    shape = ref.MODEL_SHAPES["llama2-7b"]
    ordinary = ref.model_memory(shape, 0.1, context=4096)
    widths = latent_widths(ordinary.ranks)
    assert len(widths) == 64
    assert statistics.median(widths) == 192
    assert ordinary.kv_cache == 4096 * 64 * 4096 * 2
    assert round(4096 / statistics.median(widths), 1) == 21.3
    latent = ref.model_memory(shape, 0.1, context=4096, kv_cache="latent")
    assert latent.kv_cache == 4096 * (2 * sum(widths) + 4 * 64 + 4)
    assert 21.3 < ordinary.kv_cache / latent.kv_cache < 22
    assert ref.model_memory(shape, 0.1, context=10, kv_cache="latent-int8").kv_cache == 10 * (sum(widths) + 4 * 64 + 4)
    assert latent.total == latent.weights + latent.kv_cache + latent.activations


def test_latent_widths_counts_a_fused_projection_once():
    shape = ref.MODEL_SHAPES["phi4-14b"]._replace(layers=2)
    ranks = ref.model_memory(shape, 0.3).ranks
    assert latent_widths(ranks) == [sum(ranks["0.qkv_proj"]), sum(ranks["1.qkv_proj"])]


def test_model_memory_refuses_what_makes_no_sense():
    shape = ref.MODEL_SHAPES["llama2-7b"]
    with pytest.raises(ValueError, match="must be one of full, latent, latent-int8"):
        ref.model_memory(shape, 0.1, kv_cache="int4")
    with pytest.raises(ValueError, match="no latents to cache"):
        ref.model_memory(shape, kv_cache="latent")
    with pytest.raises(ValueError, match="16, 8 or 4 bits"):
        ref.model_memory(shape, embedding_bits=2)
    with pytest.raises(ValueError, match="number of tokens"):
        ref.model_memory(shape, context=-1)
    with pytest.raises(ValueError, match="multiple of 32"):
        embedding_bytes(10, 40, 8)
    with pytest.raises(ValueError, match="smallest possible value is"):
        ref.model_memory(shape, 0.001)
