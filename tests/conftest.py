"""Settings shared by all tests: Hypothesis profiles, strategies and the two comparisons."""

import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import load_file, save_file

# A busy machine is no reason to fail: neither a deadline nor the speed of drawing examples is tested
COMMON = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=200, print_blob=True, **COMMON)
settings.register_profile("quick", max_examples=20, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure(config):
    """Let PEFT ask transformers for a name that is going; nothing of this package does."""
    config.addinivalue_line("filterwarnings", "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Directory of a random Llama with grouped queries, biases in attention, and a byte-level tokenizer."""
    return make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


def make_tiny_llama(folder, **changes):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    settings_ = {
        "vocab_size": 260,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(settings_ | changes)))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: at for at, letter in enumerate(alphabet)} | {
        "<s>": 256,
        "</s>": 257,
        "<pad>": 258,
        "<unk>": 259,
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def loud_llama(tiny_llama, tmp_path_factory):
    """The random Llama with weights so large that its predictions are far from uniform, as a trained model's are."""
    folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("loud") / "llama")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            tensor *= 24 if "embed" in name else 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """Directory of the tiny model of the package, packed, with a chat template."""
    from server import make_model

    return make_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture
def rng():
    return np.random.default_rng(0)
