"""Numbers, tokens and positions out of range: refused in words, before any work, wherever they come in."""

import ast
import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import littlebit.fast as lb
import littlebit.reference as ref
import numpy as np
import pytest
import torch
from compare import assert_same
from littlebit.fast._checks import (
    LittleBitWarning,
    check_number,
    check_positions,
    check_token_ids,
    embedding_rows,
    flat_tokens,
    has_sliding_window,
    position_limit,
    positions_of,
    window_for,
)
from littlebit.fast.cli import main as command
from littlebit.fast.cli.main import main, subcommands
from littlebit.fast.decoding import generate
from littlebit.fast.evaluation.scoring import ScoredTokens, log_probabilities
from littlebit.fast.models.embeddings import head_moments, quantize_embeddings_
from littlebit.fast.training.config import check_config

POSITIONS = 24


@pytest.fixture(scope="module")
def gpt2():
    """Build a model with a table of positions and an embedding of 260 rows."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=260, n_positions=POSITIONS, n_embd=32, n_layer=1, n_head=2)).eval()


@pytest.fixture(scope="module")
def gpt2_folder(gpt2, tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    gpt2.save_pretrained(folder)
    lb.load_tokenizer(tiny_llama).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, True, "3", None, np.float32("nan"), 1 + 2j])
def test_check_number_refuses(value):
    for whole in (False, True):
        with pytest.raises(ValueError, match=r"setting must be a (finite|whole) number >= 0, got"):
            check_number("setting", value, low=0, whole=whole)


def test_check_number_knows_its_limits():
    for value in (1, np.int64(3), 2**62):
        check_number("n", value, low=1, whole=True)
    for value in (0.5, 1, np.float32(0.25)):
        check_number("p", value, above=0, high=1)
    with pytest.raises(ValueError, match="n must be a whole number >= 1, got 2"):
        check_number("n", 2.5, low=1, whole=True)
    with pytest.raises(ValueError, match="p must be a finite number > 0 and <= 1, got 0"):
        check_number("p", 0, above=0, high=1)
    with pytest.raises(ValueError, match="p must be a finite number >= 0 and < 1, got 1"):
        check_number("p", 1, low=0, below=1)


def test_check_token_ids_names_the_token_that_has_no_row():
    check_token_ids([0, 259], 260)
    check_token_ids([10**9], None)
    for tokens, wrong in (([5, 260], "260"), ([-1, 5], "-1")):
        with pytest.raises(ValueError, match=f"must be from 0 to 259, the last row of the embedding, got {wrong}"):
            check_token_ids(tokens, 260)
    with pytest.raises(ValueError, match="at least one token is needed"):
        check_token_ids([], 260)


def test_position_limit_counts_what_scaling_adds():
    assert position_limit(None, None) is None
    assert position_limit(100, {"rope_type": "default", "rope_theta": 1e4}) == 100
    assert position_limit(100, {"rope_type": "dynamic", "factor": 2.5}) == 250
    for factor in ("4", math.inf, None):
        assert position_limit(100, {"rope_type": "dynamic", "factor": factor}) == 100
    assert position_limit(-1, None) is position_limit("9", None) is None
    llama3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    assert position_limit(131072, llama3) == 131072
    check_positions(100, 100, "a prompt")
    check_positions(10**9, None, "a prompt")
    with pytest.raises(ValueError, match=r"a prompt needs 101 positions, but the model has 100 \(max_position"):
        check_positions(101, 100, "a prompt")


@pytest.mark.parametrize(
    ("config", "slides"),
    [
        ({"model_type": "mistral"}, True),
        ({"model_type": "mistral", "sliding_window": None}, False),
        ({"model_type": "qwen2", "sliding_window": 8}, False),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True}, True),
        ({"model_type": "llama", "layer_types": ["full_attention"]}, False),
        ({"model_type": "llama", "layer_types": ["full_attention", "sliding_attention"]}, True),
    ],
)
def test_has_sliding_window_reads_the_configuration(config, slides):
    assert has_sliding_window(config) == slides


def test_limits_are_those_of_the_loaded_model(gpt2, tiny_llama):
    model = lb.load_model(tiny_llama)
    assert (positions_of(model), embedding_rows(model)) == (256, 260)
    assert (positions_of(gpt2), embedding_rows(gpt2)) == (POSITIONS, 260)
    assert (positions_of(torch.nn.Linear(2, 2)), embedding_rows(torch.nn.Linear(2, 2))) == (None, None)
    quantize_embeddings_(model, 8)
    assert embedding_rows(model) == 260
    assert window_for(gpt2, None, 2048) == POSITIONS
    assert window_for(torch.nn.Linear(2, 2), None, 2048) == 2048
    with pytest.raises(ValueError, match=f"a window of 25 tokens needs 25 positions, but the model has {POSITIONS}"):
        window_for(gpt2, POSITIONS + 1, 2048)


def test_flat_tokens_takes_one_text(gpt2):
    tokens = torch.arange(9)
    for given in (tokens, tokens[None], tokens.tolist(), [tokens.tolist()], tokens.to(torch.int16), tokens.numpy()):
        assert_same(flat_tokens(given, gpt2), tokens)
    for wrong in (tokens.reshape(3, 3), tokens.float(), tokens[None, None], tokens > 2, torch.tensor(3)):
        with pytest.raises(ValueError, match=r"integers of shape \(n,\) or \(1, n\), got shape"):
            flat_tokens(wrong, gpt2)
    for wrong in ("text", ["a"], None):
        with pytest.raises(ValueError, match="must be a tensor or list of integers, got"):
            flat_tokens(wrong, gpt2)
    with pytest.raises(ValueError, match="at least 2 tokens are needed, got 1"):
        flat_tokens(tokens[:1], gpt2, least=2)
    with pytest.raises(ValueError, match="must be from 0 to 259, the last row of the embedding, got 260"):
        flat_tokens(torch.tensor([0, 260]), gpt2)


def test_perplexity_takes_both_shapes_and_the_positions_that_there_are(gpt2):
    tokens = torch.arange(100)
    whole = lb.perplexity(gpt2, tokens, progress=False)
    assert (whole.window, whole.windows) == (POSITIONS, 4)
    assert lb.perplexity(gpt2, tokens[None], progress=False) == whole
    for settings, message in (
        ({"window": POSITIONS + 1}, "needs 25 positions"),
        ({"window": 1}, "window must be a whole number >= 2, got 1"),
        ({"window": True}, "window must be a whole number"),
        ({"max_windows": 0}, "max_windows must be a whole number >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            lb.perplexity(gpt2, tokens, progress=False, **settings)
    with pytest.raises(ValueError, match=r"must be from 0 to 259, .* got 300"):
        lb.perplexity(gpt2, tokens + 201, progress=False)


def test_everything_that_reads_text_keeps_to_the_positions(gpt2, tiny_llama):
    """Calibration and the moments of a head read shorter windows; what is longer than the model is refused."""
    model = lb.load_model(tiny_llama)
    assert lb.calibrate(model, torch.arange(256).repeat(2)[None], ["model.layers.0.mlp.up_proj"], progress=False)
    assert head_moments(gpt2, torch.arange(50)).shape == (32, 32)
    long = tuple(range(POSITIONS + 2))
    assert len(log_probabilities(gpt2, [ScoredTokens(long[:-1], 1)], progress=False)) == 1  # the last token is not read
    with pytest.raises(ValueError, match=f"but the model has {POSITIONS}"):
        log_probabilities(gpt2, [ScoredTokens(long, 1)], progress=False)
    with pytest.raises(ValueError, match=r"must be from 0 to 259, .* got 260"):
        log_probabilities(gpt2, [ScoredTokens((0, 260), 1)], progress=False)


def test_generate_refuses_the_same_in_every_engine(gpt2, tiny_llama):
    """Mapped, compiled, on the engine of GPUs, through transformers, and with a latent cache."""
    from littlebit.fast.decoding.graph_decoder import decode_batch
    from littlebit.fast.decoding.mapped_weights import map_model

    loaded, tokenizer = lb.load_model(tiny_llama), lb.load_tokenizer(tiny_llama)
    for model, limit in ((map_model(tiny_llama), 256), (loaded, 256), (gpt2, POSITIONS)):
        for prompt, new in (([1] * limit, 2), ([1], limit + 1)):
            with pytest.raises(ValueError, match=f"needs {limit + 1} positions, but the model has {limit}"):
                generate.stream_tokens(model, prompt, lb.GenerationConfig(new))
            with pytest.raises(ValueError, match=f"needs {limit + 1} positions"):
                generate.batch_tokens(model, [[1], prompt], lb.GenerationConfig(new))
        for wrong in (260, -1):
            with pytest.raises(ValueError, match=f"must be from 0 to 259, the last row of the embedding, got {wrong}"):
                generate.stream_tokens(model, [1, wrong], lb.GenerationConfig(3))
    with pytest.raises(ValueError, match="needs 257 positions"):
        decode_batch(loaded, [[1] * 256], lb.GenerationConfig(2))
    assert len(list(generate.stream_tokens(gpt2, [1] * (POSITIONS - 2), lb.GenerationConfig(3), 0))) <= 3
    settings = [("max_new_tokens", 0), ("max_new_tokens", 2.0), ("temperature", math.nan), ("temperature", -0.5)]
    settings += [("top_p", 0), ("top_p", 1.5), ("top_k", -1), ("seed", -1), ("seed", 0.5), ("temperature", math.inf)]
    settings += [("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0), ("repetition_penalty", math.inf)]
    for name, value in settings:
        with pytest.raises(ValueError, match=f"{name} must be a (finite|whole) number"):
            lb.generate(loaded, "abc", tokenizer=tokenizer, **{name: value})
    for prompt, message in (("a\udcff", "UTF-8"), (b"abc", "must be a str, got bytes"), ("", "prompt is empty")):
        with pytest.raises(ValueError, match=message):
            next(generate.stream(loaded, prompt, tokenizer=tokenizer))
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        generate.generate_tokens(loaded, torch.ones(2, 2, dtype=torch.int64), lb.GenerationConfig())
    tokens = torch.tensor([5, 6, 7])
    config = lb.GenerationConfig(3)
    assert_same(
        generate.generate_tokens(loaded, tokens, config), generate.generate_tokens(loaded, tokens[None], config)
    )


@pytest.mark.parametrize(
    "change",
    [
        *({"bits": value} for value in (math.nan, math.inf, 0, -1.0, True)),
        *({"seed": value} for value in (-1, 1.5)),
        *({"paths": value} for value in (0, 1.0, True)),
        {"kv_rank_factor": math.nan},
    ],
)
def test_quantize_refuses_numbers_that_make_no_sense(tiny_llama, change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} must be a (finite|whole) number"):
        lb.quantize_(torch.nn.Sequential(torch.nn.Linear(32, 32)), lb.Config(**change), progress=False)


def test_training_refuses_numbers_that_make_no_sense():
    wrong = {"total_tokens": (0, 1.5, True), "sequence_length": (0,), "batch_size": (-1,)}
    wrong |= {"micro_batch": (0, 1.0), "seed": (-1,)}
    wrong |= {"block_tokens": (-1, 0.5), "warmup": (1, -0.1, math.nan), "max_grad_norm": (-1,), "betas": ((0.9, 1),)}
    wrong |= {
        "long_tokens": (-1,),
        "long_sequence": (0,),
        "frozen_tokens": (0.5,),
        "label_weight": (1.5, -0.1, math.nan),
    }
    wrong |= dict.fromkeys(
        ("lr_latents", "lr_scales", "lr_others", "hidden_loss_weight", "final_lr_fraction", "latent_scale"),
        (math.nan, -1, math.inf, "1"),
    )
    fields = {field.name for field in dataclasses.fields(lb.TrainConfig)}
    assert fields - wrong.keys() == {"train", "rule", "normalize", "optimizer"}
    check_config(lb.TrainConfig(), 1)
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f"{name} must be a (finite|whole) number"):
                check_config(lb.TrainConfig(**{name: value}), 1)


COMMANDS = {
    "eval x": "--window 1 --window 0 --max-windows 0 --blimp-items 0 --threads -1 --threads 0",
    "generate x --prompt a": "--max-new-tokens -1 --temperature nan --top-p 0 --top-k -1 --seed -1 "
    "--min-p 2 --repetition-penalty 0",
    "quantize x y": "--bits nan --bits -1 --bits inf --seed -1 --kv-rank-factor 0 --seed 1e3 --calibration-tokens 1",
    "train x y": "--tokens 0 --batch 0 --lr-latents nan --lr-scales -1 --lr-others inf --sequence 0 --save-minutes nan "
    "--warmup 1 --clip -1 --final nan --hidden inf --block-tokens -1 --micro-batch 0 --log-steps 0 --weights nan "
    "--weights -1 --bits 0",
    "memory": "--bits nan --bits 0 --paths 0 --context 0 --embedding-bits 5",
    "bench linear": "--shape 0x4 --bits nan --paths 0 --batch 0 --threads 0 --tokens 0 --rounds 0 --context 0",
    "tune": "--bits nan --paths 0 --batch 0",
}
REFUSED = [
    (words, *each)
    for words, options in COMMANDS.items()
    for each in zip(options.split()[::2], options.split()[1::2], strict=True)
]


@pytest.mark.parametrize(("words", "name", "value"), REFUSED)
def test_command_refuses_numbers_out_of_range(words, name, value, capsys):
    with pytest.raises(SystemExit) as left:
        main([*words.split(), name, value])
    assert left.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {name}: " in error
    assert value in error


def test_every_number_of_the_command_has_limits():
    """No option is read by int or float alone, but for those with choices."""
    for sub in subcommands(command.build_parser()).values():
        for action in sub._actions:
            assert action.type not in (int, float) or action.choices, action.option_strings


@pytest.mark.parametrize("name", ["eval", "generate", "quantize", "train"])
def test_command_refuses_positions_that_a_model_lacks(gpt2_folder, name, tmp_path, capsys):
    out = str(tmp_path / "out")
    words = {
        "eval": ["--window", "25"],
        "generate": ["--prompt", "abc", "--max-new-tokens", "30"],
        "quantize": [out, "--bits", "3", "--init", "admm", "--importance", "--calibration-tokens", "64"],
        "train": [out, "--bits", "3", "--sequence", "25", "--tokens", "50", "--batch", "1"],
    }[name]
    text = tmp_path / "text.txt"
    text.write_text("hello " * 40)
    words += {"eval": ["--text", str(text)], "train": ["--data", str(text)]}.get(name, [])
    code = main([name, str(gpt2_folder), *words])
    printed = capsys.readouterr()
    if code:
        assert code == 2
        assert printed.err.startswith("littlebit: error: ")
    assert name == "quantize" or f"but the model has {POSITIONS} (max_position_embeddings)" in printed.err
    if name == "eval":
        assert main([name, str(gpt2_folder), "--text", str(text)]) == 0
        assert f"windows of {POSITIONS} tokens" in capsys.readouterr().out


def test_save_refuses_numbers_that_no_checkpoint_holds(tiny_llama, tmp_path):
    model = lb.load_model(tiny_llama)
    lb.quantize_(model, lb.Config(bits=3.0), progress=False)
    for settings in ({"bits": math.nan}, {"bits": -1}, {"shard_bytes": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} must be a"):
            lb.save(model, tmp_path / "out", **settings)
    with pytest.raises(ValueError, match="bits must be a finite number > 0, got inf"):
        lb.save_official(model, tmp_path / "out", bits=math.inf)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [math.nan, math.inf, -1.0, 0.0])
def test_memory_refuses_bits_that_make_no_sense(bits):
    for package in (lb, ref):
        with pytest.raises(ValueError, match="bits"):
            package.model_memory(lb.MODEL_SHAPES["llama2-7b"], bits)


def text_calls_without_encoding(source):
    """Lines of calls that open a text file with the locale's encoding."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and not any(keyword.arg == "encoding" for keyword in node.keywords):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            texts = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            modes = [each for each in texts if each and set(each) <= set("rwax+bt")]
            plain = isinstance(node.func, ast.Name) and not modes
            method = isinstance(node.func, ast.Attribute) and name in ("read_text", "write_text")
            if method or (name == "open" and (plain or any("b" not in m for m in modes))):
                yield node.lineno


def test_packages_name_the_encoding_of_text_files():
    calls = "open(a)\nb.open('a')\nc.open('rb')\nd.read_text()\nos.open(e, f)"
    assert list(text_calls_without_encoding(calls)) == [1, 2, 4]
    for package in (lb, ref):
        for path in Path(package.__file__).parent.rglob("*.py"):
            lines = list(text_calls_without_encoding(path.read_text(encoding="utf-8")))
            assert not lines, f"{path.name}: lines {lines} open text without encoding='utf-8'"


def test_letters_survive_any_locale(tiny_llama, tmp_path):
    """A prompt, a chat template and text outside ASCII where the locale is C: the same as in UTF-8."""
    from test_mapped import quantized

    path = quantized(tiny_llama, tmp_path / "out")
    file = path / "chat_template.jinja"
    file.write_text("{{ 'ü漢' + messages[0]['content'] }}", encoding="utf-8")
    words = ["generate", path, "--prompt", "é", "--chat", "--max-new-tokens", "12"]
    printed = []
    for locale in ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONUTF8": "1"}):
        run = [sys.executable, "-m", "littlebit.fast", *map(str, words)]
        done = subprocess.run(run, capture_output=True, env=os.environ | locale, timeout=300, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        printed.append(done.stdout.decode())
    asked = printed[1].encode("ascii", "replace").decode()
    assert printed[0] == asked


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "littlebit: stopped by Ctrl-C; no unfinished output is left\n"),
        (BrokenPipeError(), 141, ""),
        (ValueError("bits"), 2, "littlebit: error: bits\n"),
    ],
)
def test_command_ends_quietly(error, code, message, monkeypatch, capsys):
    def run(arguments):
        raise error

    monkeypatch.setitem(command.COMMANDS, "fetch", command.COMMANDS["fetch"]._replace(run=run))
    monkeypatch.setattr(command, "discard_output", lambda: None)
    assert main(["fetch", "tiny"]) == code
    assert capsys.readouterr() == ("", message)


def test_sigterm_leaves_no_unfinished_output(tiny_llama, tmp_path, monkeypatch, capsys):
    """While files are written; finished layers stay, and the handler from before comes back."""
    from littlebit.fast.checkpoints import checkpoint

    def write(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal came too late")

    monkeypatch.setattr(checkpoint, "write_tensors", write)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["quantize", str(tiny_llama), str(tmp_path / "out"), "--bits", "3"]) == 143
    assert capsys.readouterr().err.splitlines()[-1] == "littlebit: stopped by SIGTERM; no unfinished output is left"
    assert [path.name for path in tmp_path.iterdir()] == ["out.layers"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_closed_pipe_ends_the_command(tiny_llama):
    run = [sys.executable, "-m", "littlebit.fast", "generate", str(tiny_llama), "--prompt", "abc"]
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=300) == 141


def test_command_shows_its_own_warnings_alone(monkeypatch, capsys):
    import warnings

    def run(arguments):
        warnings.warn("a name changes", FutureWarning, stacklevel=1)
        warnings.warn("look here", LittleBitWarning, stacklevel=1)

    monkeypatch.setitem(command.COMMANDS, "fetch", command.COMMANDS["fetch"]._replace(run=run))
    assert main(["fetch", "tiny"]) == 0
    assert capsys.readouterr() == ("", "littlebit: warning: look here\n")
