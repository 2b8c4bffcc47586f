"""Generation from mapped files without torch: what a loaded model writes, in little memory, with the same errors."""

import copy
import json
import logging
import shutil
import subprocess
import sys
import warnings

import littlebit.fast as lb
import numpy as np
import pytest
import torch
from compare import assert_same
from conftest import make_tiny_llama
from hypothesis import given, strategies as st
from littlebit.fast.bench.decode import prefilled_decoder, token_times
from littlebit.fast.checkpoints.format import is_checkpoint
from littlebit.fast.cli.main import main
from littlebit.fast.decoding.architecture import NotDecodableError
from littlebit.fast.decoding.cpu_decoder import Decoder, decode
from littlebit.fast.decoding.mapped_weights import map_model, widen_words
from littlebit.fast.decoding.tokenizer import Tokenizer
from littlebit.fast.decoding.torch_weights import decodable
from littlebit.fast.models.embeddings import quantize_embeddings_
from littlebit.fast.models.generation_settings import GenerationConfig
from littlebit.fast.packing import pack_signs
from safetensors.torch import load_file
from test_decode import CHANGES
from test_model import BITS, DAMAGES, edit_config, without_checksums
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaTokenizer, Qwen2Tokenizer

PROMPT = "Once upon a time"
TEMPLATE = (
    "{%- for message in messages %}{{ '<s>' + message['role'] + ': ' + message['content'] | trim + eos_token }}\n"
    "{%- if loop.last %}{% break %}{% endif %}{% endfor %}\n"
    "{% if add_generation_prompt %}{{ bos_token }}assistant:{{ {'a': 'ä<'} | tojson }}{% endif %}"
)


def quantized(folder, out, embedding_bits=16):
    model, tokenizer = lb.load_model(folder), lb.load_tokenizer(folder)
    tokenizer.chat_template = TEMPLATE
    lb.quantize_(model, lb.Config(bits=BITS, exclude=("*.0.mlp.up_proj",)), progress=False)
    quantize_embeddings_(model, embedding_bits)
    return lb.save(model, out, tokenizer)


@pytest.fixture(scope="module", params=list(CHANGES))
def dense(request, tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("mapped") / "dense", **CHANGES[request.param])


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, tmp_path_factory):
    return quantized(tiny_llama, tmp_path_factory.mktemp("mapped") / "out", 8)


@pytest.fixture(scope="module")
def plain(tiny_llama, tmp_path_factory):
    """The checkpoint that DAMAGES are for."""
    model = lb.load_model(tiny_llama)
    lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    return lb.save(model, tmp_path_factory.mktemp("mapped") / "plain", lb.load_tokenizer(tiny_llama))


@pytest.fixture
def copied(checkpoint, tmp_path):
    return without_checksums(shutil.copytree(checkpoint, tmp_path / "copy"))


def assert_decodes_the_same(mapped, loaded):
    tokens = np.arange(41) * 7 % 256
    assert mapped.sizes == loaded.sizes
    assert mapped.generation == loaded.generation
    assert_same(Decoder(mapped, 64)(tokens), Decoder(loaded, 64)(tokens))
    for settings in (
        {},
        {"temperature": 1.2, "top_k": 50, "top_p": 0.95, "seed": 3},
        {"temperature": 0.7, "repetition_penalty": 1.3, "min_p": 0.05},
    ):
        config = GenerationConfig(30, **settings)
        assert list(decode(mapped, [5, 6, 7], config)) == list(decode(loaded, [5, 6, 7], config))


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_mapped_files_decode_as_the_loaded_model_does(dense, bits, tmp_path):
    path = quantized(dense, tmp_path / "out", bits)
    assert_decodes_the_same(map_model(path), decodable(lb.load(path)))


def test_mapped_shards_decode_as_the_loaded_model_does(tiny_llama, tmp_path):
    model = lb.load_model(tiny_llama)
    lb.quantize_(model, lb.Config(bits=BITS), progress=False)
    path = lb.save(model, tmp_path / "out", shard_bytes=20_000)
    assert len(list(path.glob("*.safetensors"))) > 1
    assert_decodes_the_same(map_model(path), decodable(lb.load(path)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mapped_dense_models_decode_as_the_loaded_ones_do(dense, dtype, tmp_path):
    path = shutil.copytree(dense, tmp_path / "dense")
    lb.load_model(dense, dtype=dtype).save_pretrained(path)
    assert next(iter(load_file(path / "model.safetensors").values())).dtype == dtype
    assert_decodes_the_same(map_model(path), decodable(lb.load_model(path)))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {}),
        ("mistral", {"sliding_window": None, "head_dim": 32}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    ],
)
def test_mapped_models_of_other_kinds_decode_as_the_loaded_ones_do(kind, changes, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256}
    config = AutoConfig.for_model(kind, num_attention_heads=4, num_key_value_heads=2, **(sizes | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "dense")
    assert_decodes_the_same(map_model(tmp_path / "dense"), decodable(lb.load_model(tmp_path / "dense")))
    lb.quantize_(model, lb.Config(bits=2.5), progress=False)
    path = lb.save(model, tmp_path / "out")
    assert_decodes_the_same(map_model(path), decodable(lb.load(path)))


def test_generate_writes_the_same_mapped_and_loaded(checkpoint, capsys):
    model, tokenizer = lb.load(checkpoint), lb.load_tokenizer(checkpoint)
    for words, settings in [
        ([], {}),
        (["--chat"], {"chat": True}),
        (["--temperature", "1.1", "--top-k", "40", "--seed", "7"], {"temperature": 1.1, "top_k": 40, "seed": 7}),
        (["--repetition-penalty", "1.5"], {"repetition_penalty": 1.5}),
        (["--temperature", "1.1", "--min-p", "0.1"], {"temperature": 1.1, "min_p": 0.1}),
        (["--kv-cache", "latent"], {"kv_cache": "latent"}),
    ]:
        assert main(["generate", str(checkpoint), "--prompt", PROMPT, "--max-new-tokens", "40", *words]) == 0
        expected = lb.generate(model, PROMPT, 40, tokenizer=tokenizer, **settings)
        assert capsys.readouterr().out == expected + "\n"


GENERATE = """
import sys
from littlebit.fast.cli.main import main
code = main(["generate", *sys.argv[1:]])
assert not {"torch", "transformers"} & set(sys.modules)
peak = next(int(line.split()[1]) // 1000 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak, file=sys.stderr)
sys.exit(code)
"""


def generate_alone(*arguments):
    """Output, and peak of the resident memory in MB, of a process that must not import torch or transformers."""
    command = [sys.executable, "-c", GENERATE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout, int(done.stderr.splitlines()[-1])


def test_generate_needs_neither_torch_nor_transformers_nor_their_memory(checkpoint, capsys):
    words = [str(checkpoint), "--prompt", PROMPT, "--max-new-tokens", "10"]
    generate_alone(*words)  # compiles what is not yet compiled, which takes memory of its own
    text, peak = generate_alone(*words, "--threads", "1")
    assert main(["generate", *words]) == 0
    assert text == capsys.readouterr().out
    assert 0 < peak < 220  # about 130; importing torch alone takes 240
    sampled, _ = generate_alone(*words, "--chat", "--temperature", "0.8", "--json")
    assert json.loads(sampled)["new_tokens"] > 0


def test_bench_decode_measures_the_mapped_model(checkpoint):
    assert len(token_times(prefilled_decoder(str(checkpoint), 1, 3), 3)) == 3


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_generate_refuses_damaged_checkpoints_with_the_words_of_load(
    plain, damage, message, checksums, tmp_path, capsys
):
    copied = shutil.copytree(plain, tmp_path / "copy")
    if not checksums:  # which notice most of them first
        without_checksums(copied)
    damage(copied)
    if not is_checkpoint(copied):  # but perhaps a dense model
        with pytest.raises(NotDecodableError):
            map_model(copied)
        return
    with pytest.raises(lb.CheckpointError, match=None if checksums else message) as error:
        lb.load(copied)
    assert main(["generate", str(copied), "--prompt", PROMPT]) == 2
    assert capsys.readouterr().err == f"littlebit: error: {error.value}\n"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda path: (path / "littlebit_config.json").write_text("{}"), "format"),
        (lambda path: edit_config(path, lambda c: c.update(model_type="gpt2")), "gpt2"),
        (lambda path: edit_config(path, lambda c: c.update(hidden_act="gelu")), "gelu"),
        (lambda path: edit_config(path, lambda c: c.pop("num_key_value_heads")), "num_key_value_heads"),
        (lambda path: edit_config(path, lambda c: c.pop("rms_norm_eps")), "rms_norm_eps"),
        (lambda path: edit_config(path, lambda c: c.update(num_hidden_layers=10**12)), "layers"),
        (lambda path: edit_config(path, lambda c: c.update(num_hidden_layers=1)), "packed"),
        (lambda path: edit_config(path, lambda c: c.update(head_dim=24)), "sixteen"),
        (lambda path: edit_config(path, lambda c: c["rope_parameters"].update(rope_type="yarn")), "yarn"),
        (lambda path: edit_config(path, lambda c: c["rope_parameters"].pop("rope_theta")), "rope_theta"),
        (lambda path: edit_config(path, lambda c: c.pop("max_position_embeddings")), "max_position_embeddings"),
        (lambda path: edit_config(path, lambda c: c.update(rope_scaling={"factor": 2.0})), "outside rope_parameters"),
        (lambda path: edit_config(path, lambda c: c.update(partial_rotary_factor=0.5)), "outside rope_parameters"),
        (lambda path: edit_config(path, lambda c: c.update(model_type="mistral")), "sliding window"),
        (lambda path: edit_config(path, lambda c: c.update(layer_types=["sliding_attention"] * 2)), "sliding window"),
        (lambda path: edit_config(path, lambda c: c["quantization_config"].update(fused={"a": []})), "split"),
        (lambda path: edit_config(path, lambda c: c["quantization_config"].pop("embeddings")), "embed_tokens.weight"),
        (lambda path: edit_config(path, lambda c: c.update(vocab_size=300)), "table.codes"),
        (lambda path: edit_config(path, lambda c: c.update(attention_bias=False, mlp_bias=True)), "up_proj.bias"),
    ],
)
def test_map_model_leaves_what_it_does_not_know_to_load(copied, change, reason):
    map_model(copied)
    change(copied)
    with pytest.raises(NotDecodableError, match=reason):
        map_model(copied)


def test_generate_loads_by_torch_what_cannot_be_mapped(tiny_llama, copied, capsys, caplog):
    edit_config(copied, lambda config: config.pop("rope_parameters"))  # which transformers then takes from its class
    with caplog.at_level(logging.DEBUG, logger="littlebit.fast.cli.generate"):
        assert main(["generate", str(copied), "--prompt", PROMPT, "--max-new-tokens", "5"]) == 0
    assert "is loaded by torch: its rotary embedding" in caplog.text
    assert capsys.readouterr().out == lb.generate(lb.load(copied), PROMPT, 5) + "\n"


def test_tensors_that_are_not_aligned_are_copied(tiny_llama, tmp_path):
    """A header of any length is allowed; its tensors then lie at odd addresses."""
    path = shutil.copytree(tiny_llama, tmp_path / "odd")
    content = (path / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end].rstrip() + b" " * 5
    header += b" " * (len(header) % 2 == 0)
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    assert_decodes_the_same(map_model(path), decodable(lb.load_model(tiny_llama)))


@given(st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_widen_words_gives_those_of_a_longer_row(count, seed):
    signs = torch.from_numpy(np.random.default_rng(seed).standard_normal((3, count)))
    longer = torch.cat([signs, torch.ones(3, 32)], -1)
    words = -(-count // 32)
    assert_same(widen_words(pack_signs(signs).numpy()), pack_signs(longer).numpy().view(np.uint32)[:, :words])


def vocabulary():
    letters = {chr(each): at for at, each in enumerate(range(33, 127))}
    pieces = ["Ġ", "▁", "Ċ", "th", "the", "▁the", "Ġth", "Ġthe", "<unk>", "<s>", "</s>", "<|endoftext|>"]
    return letters | {piece: len(letters) + at for at, piece in enumerate(pieces)}


@pytest.fixture(scope="module", params=["bytes", "llama", "qwen2", "gpt2"])
def tokenizers(request, tiny_llama, tmp_path_factory):
    """A tokenizer read by transformers, and by this package."""
    folder = tmp_path_factory.mktemp("tokenizer")
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("Ġ", "th"), ("Ġth", "e")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if request.param == "bytes":
            folder = tiny_llama
        else:
            kind = {"llama": LlamaTokenizer, "qwen2": Qwen2Tokenizer, "gpt2": GPT2Tokenizer}[request.param]
            kind(vocab=vocabulary(), merges=merges).save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder), Tokenizer(folder)


@given(text=st.text(max_size=40) | st.text("the <s>/|endoftx\n ", max_size=40), special=st.booleans())
def test_tokenizer_encodes_and_decodes_as_transformers_does(tokenizers, text, special):
    theirs, mine = tokenizers
    tokens = theirs(text, add_special_tokens=special)["input_ids"]
    assert mine(text, add_special_tokens=special)["input_ids"] == tokens
    for skip in (False, True):
        assert mine.decode(tokens, skip_special_tokens=skip) == theirs.decode(tokens, skip_special_tokens=skip)
    assert (mine.eos_token_id, mine.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)


def test_tokenizer_writes_chats_as_transformers_does(checkpoint, tiny_llama):
    messages = [{"role": "user", "content": " What is <this>?\n"}]
    theirs, mine = lb.load_tokenizer(checkpoint), Tokenizer(checkpoint)
    for prompt in (False, True):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert mine.apply_chat_template(messages, add_generation_prompt=prompt) == expected
    with pytest.raises(ValueError, match="has no chat template"):
        Tokenizer(tiny_llama).apply_chat_template(messages)
    refusing = copy.copy(mine)
    refusing.template = "{{ raise_exception('no ' + messages[0]['role']) }}"
    with pytest.raises(ValueError, match="cannot be used: no user"):
        refusing.apply_chat_template(messages)
    refusing.template = "{{ messages.__class__.__mro__ }}"
    with pytest.raises(ValueError, match="cannot be used"):
        refusing.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("tokenizer_config.json", lambda c: c.update(tokenizer_class="BertTokenizer"), "only transformers knows"),
        ("tokenizer_config.json", lambda c: c.update(split_special_tokens=True), "only transformers knows"),
        ("tokenizer_config.json", lambda c: c.pop("backend"), "only transformers knows"),
        ("tokenizer_config.json", lambda c: c.update(eos_token="<new>"), "not in tokenizer.json"),
        ("tokenizer_config.json", lambda c: c.update(chat_template=["a", "b"]), "only transformers knows"),
        ("tokenizer.json", lambda c: c.pop("model"), "cannot be read"),
    ],
)
def test_tokenizer_leaves_what_it_does_not_know_to_transformers(tiny_llama, tmp_path, file, change, reason):
    folder = shutil.copytree(tiny_llama, tmp_path / "copy")
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(NotDecodableError, match=reason):
        Tokenizer(folder)
    (folder / file).unlink()
    with pytest.raises(NotDecodableError, match="cannot be read"):
        Tokenizer(folder)
