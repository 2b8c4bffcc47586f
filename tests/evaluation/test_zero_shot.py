"""Test zero-shot evaluation: BLiMP against a plain loop over sentences, untrusted archives, and the harness."""

import contextlib
import importlib.util
import json
import os
import random
import sys
import zipfile
from types import ModuleType, SimpleNamespace

import littlebit.fast as lb
import numpy as np
import pytest
import torch
from beside_harness import evaluated_beside_harness
from compare import assert_within
from hypothesis import given, settings, strategies as st
from littlebit.fast.cli.main import main
from littlebit.fast.evaluation import archives, zero_shot
from littlebit.fast.evaluation.scoring import ScoredTokens, log_probabilities

PAIRS = {
    "agreement": [("The cats sleep.", "The cats sleeps."), ("A dog barks", "A dog bark"), ("We go", "We goes")],
    "binding": [("She sees herself.", "She sees himself."), ("It is it", "It is it")],
}
LINE = {"sentence_good": "a", "sentence_bad": "b"}
VOCABULARY = 260  # of the tiny Llama

words = st.text("abcdefgh ", min_size=1, max_size=12).filter(str.strip)
paradigms = st.dictionaries(
    st.text("xyz", min_size=1, max_size=4), st.lists(st.tuples(words, words), min_size=1, max_size=4), min_size=1
)


@pytest.fixture(scope="module")
def model(tiny_llama):
    return lb.load_model(tiny_llama)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return lb.load_tokenizer(tiny_llama)


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, tmp_path_factory):
    packed = lb.load_model(tiny_llama)
    lb.quantize_(packed, lb.Config(bits=2.5))
    return lb.save(packed, tmp_path_factory.mktemp("zero-shot") / "out", lb.load_tokenizer(tiny_llama))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("archives")


def line(good, bad):
    return json.dumps({"sentence_good": good, "sentence_bad": bad})


def archive(path, members, method=zipfile.ZIP_DEFLATED):
    """Write a zip archive: texts as they are, lists of pairs as data/NAME.jsonl."""
    with zipfile.ZipFile(path, "w", method) as out:
        for name, content in members.items():
            if isinstance(content, list):
                name, content = f"data/{name}.jsonl", "".join(line(*pair) + "\n" for pair in content)
            out.writestr(name, content)
    return path


def plain_score(model, tokenizer, sentence):
    """Total log-probability of one sentence, and the sum of the magnitudes that it is a difference of."""
    tokens = [tokenizer.bos_token_id, *tokenizer.encode(" " + sentence, add_special_tokens=False)]
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0, :-1].double()
    normalisers = torch.logsumexp(logits, -1)
    chosen = logits[torch.arange(len(logits)), torch.tensor(tokens[1:])]
    return (chosen - normalisers).sum().item(), (chosen.abs() + normalisers.abs()).sum().item()


@pytest.mark.parametrize("batch", [1, 7, 30, 10**6])
def test_log_probabilities_are_those_of_one_sentence_at_a_time(model, tokenizer, batch):
    model = lb.load_model(model.name_or_path, dtype=torch.float64)  # leaves the rounding of the log-softmax
    sentences = sorted({text for pairs in PAIRS.values() for pair in pairs for text in pair})
    tokens = zero_shot.sentence_tokens(tokenizer, sentences)
    rows = [ScoredTokens(row, len(row) - 1) for row in tokens]
    scores = log_probabilities(model, rows, batch, progress=False)
    plain = np.array([plain_score(model, tokenizer, sentence) for sentence in sentences])
    actual = np.array([scores[row] for row in rows], np.float32)
    assert len(scores) == len(sentences)
    assert_within(actual, plain[:, 0], plain[:, 1], terms=VOCABULARY)


@settings(max_examples=25)
@given(pairs=paradigms, batch=st.integers(1, 100), seed=st.integers(0, 9))
def test_blimp_counts_right_pairs_whatever_the_order_and_the_batch(model, tokenizer, folder, pairs, batch, seed):
    shuffled = {name: random.Random(seed).sample(pairs[name], len(pairs[name])) for name in reversed(pairs)}
    results = [
        lb.blimp(model, tokenizer, archive(folder / "order.zip", given_), batch=size, progress=False)
        for given_, size in [(pairs, 10**6), (shuffled, 10**6), (pairs, batch)]
    ]
    assert results[0] == results[1] == results[2]
    right = {
        name: [plain_score(model, tokenizer, good)[0] > plain_score(model, tokenizer, bad)[0] for good, bad in group]
        for name, group in pairs.items()
    }
    assert results[0].paradigms == {name: sum(row) / len(row) for name, row in right.items()}
    assert list(results[0].paradigms) == sorted(pairs)
    assert results[0].pairs == sum(map(len, right.values()))
    assert abs(results[0].accuracy - np.mean(list(results[0].paradigms.values()))) < 1e-12


@settings(max_examples=25)
@given(pairs=paradigms)
def test_blimp_of_swapped_pairs_is_the_complement_but_for_ties(model, tokenizer, folder, pairs):
    swapped = {name: [(bad, good) for good, bad in group] for name, group in pairs.items()}
    there = lb.blimp(model, tokenizer, archive(folder / "swap.zip", pairs), progress=False)
    back = lb.blimp(model, tokenizer, archive(folder / "swap.zip", swapped), progress=False)
    for name, group in pairs.items():
        ties = sum(good == bad for good, bad in group)
        assert round(len(group) * (there.paradigms[name] + back.paradigms[name])) == len(group) - ties


def test_blimp_of_uniform_logits_prefers_the_shorter_sentence_and_counts_ties_as_wrong(tokenizer, tmp_path):
    class Uniform(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens, use_cache):
            return SimpleNamespace(logits=torch.zeros(*tokens.shape, VOCABULARY))

    pairs = {"length": [("a", "ab"), ("ab", "a"), ("abc", "cba")], "same": [("a", "a")]}
    result = lb.blimp(Uniform(), tokenizer, archive(tmp_path / "blimp.zip", pairs), progress=False)
    assert result == (1 / 6, {"length": 1 / 3, "same": 0.0}, 4)


def test_blimp_items_takes_the_first_pairs_of_each_paradigm(model, tokenizer, tmp_path):
    path = archive(tmp_path / "blimp.zip", PAIRS)
    first = archive(tmp_path / "first.zip", {name: pairs[:2] for name, pairs in PAIRS.items()})
    result = lb.blimp(model, tokenizer, path, items=2, progress=False)
    assert result == lb.blimp(model, tokenizer, first, progress=False)
    assert result.pairs == 4
    assert lb.blimp(model, tokenizer, path, items=99, progress=False).pairs == 5
    for wrong in ({"items": 0}, {"batch": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a whole number >= 1, got 0"):
            lb.blimp(model, tokenizer, path, **wrong)


def test_sentence_tokens_follow_bos_or_else_eos():
    class Letters:
        """A tokenizer of letters; some put BOS before a text though they are asked for no special tokens."""

        def __init__(self, bos, eos, begin=()):
            self.bos_token_id, self.eos_token_id, self.begin = bos, eos, begin

        def __call__(self, texts, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [[*self.begin, *map(ord, text.strip("_ "))] for text in texts]}

    assert zero_shot.sentence_tokens(Letters(1, 2), ["a", "bc"]) == [(1, 97), (1, 98, 99)]
    assert zero_shot.sentence_tokens(Letters(0, 2), ["a"]) == [(0, 97)]
    assert zero_shot.sentence_tokens(Letters(None, 2), ["a"]) == [(2, 97)]
    assert zero_shot.sentence_tokens(Letters(1, 2, begin=[1]), ["a"]) == [(1, 97)]
    with pytest.raises(ValueError, match="must have a BOS or an EOS token"):
        zero_shot.sentence_tokens(Letters(None, None), ["a"])
    with pytest.raises(ValueError, match="'_' has no token to score"):
        zero_shot.sentence_tokens(Letters(1, 2), ["a", "_"])


def test_read_paradigms_leaves_out_other_files_and_blank_lines(tmp_path):
    extra = {"README.md": "no pairs", "__MACOSX/data/._binding.jsonl": "\xb0", "data/more.jsonl": f"\n{line('a', 'b')}"}
    path = archive(tmp_path / "blimp.zip", PAIRS | extra, zipfile.ZIP_STORED)
    assert zero_shot.read_paradigms(path) == PAIRS | {"more": [("a", "b")]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "JSONDecodeError"),
        ("\x00", "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ("[]", "TypeError"),
        (json.dumps({"sentence_good": "a"}), "KeyError('sentence_bad')"),
        (line("a", 1), "not a text of 1 to 1000 bytes"),
        (line(" ", "b"), "not a text of 1 to 1000 bytes"),
        (line("a", "b" * 1001), "not a text of 1 to 1000 bytes"),
        (line("a", "\ud800"), "surrogates not allowed"),
    ],
)
def test_damaged_lines_are_named(tmp_path, text, reason):
    path = archive(tmp_path / "blimp.zip", {"data/some.jsonl": f"{line('a', 'b')}\n{text}\n"})
    with pytest.raises(ValueError, match="with the texts sentence_good and sentence_bad") as caught:
        zero_shot.read_paradigms(path)
    assert str(caught.value).startswith(f"{path}: data/some.jsonl, line 2 is not a minimal pair (")
    assert reason in str(caught.value)
    assert zero_shot.read_paradigms(path, items=1) == {"some": [("a", "b")]}


@pytest.mark.parametrize(
    ("members", "method", "message"),
    [
        ({}, zipfile.ZIP_STORED, "holds no paradigm"),
        ({"README.md": "text"}, zipfile.ZIP_STORED, "holds no paradigm"),
        ({"a.jsonl": "\n"}, zipfile.ZIP_STORED, "a.jsonl holds no pairs"),
        ({"x/a.jsonl": json.dumps(LINE), "y/a.jsonl": json.dumps(LINE)}, zipfile.ZIP_STORED, "two files a.jsonl"),
        ({"a.jsonl": json.dumps(LINE)}, zipfile.ZIP_LZMA, "not deflate"),
    ],
)
def test_archives_that_are_not_blimp_are_refused(tmp_path, members, method, message):
    with pytest.raises(ValueError, match=message):
        zero_shot.read_paradigms(archive(tmp_path / "blimp.zip", members, method))


def test_archives_larger_than_the_limit_are_refused(tmp_path, monkeypatch):
    path = archive(tmp_path / "blimp.zip", PAIRS)
    monkeypatch.setattr(archives, "LARGEST", sum(member.file_size for member in zipfile.ZipFile(path).filelist))
    assert zero_shot.read_paradigms(path) == PAIRS
    monkeypatch.setattr(archives, "LARGEST", archives.LARGEST - 1)
    with pytest.raises(ValueError, match="larger than"):
        zero_shot.read_paradigms(path)


@given(data=st.data())
def test_damaged_archives_raise_value_errors_or_nothing(folder, data):
    whole = bytearray(archive(folder / "whole.zip", PAIRS).read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=4)):
        whole[at] = data.draw(st.integers(0, 255))
    damaged = folder / "damaged.zip"
    damaged.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with contextlib.suppress(ValueError):
        read = zero_shot.read_paradigms(damaged)
        assert all(isinstance(text, str) for pairs in read.values() for pair in pairs for text in pair)


def test_eval_blimp_prints_accuracies_and_no_perplexity(tiny_llama, checkpoint, model, tokenizer, tmp_path, capsys):
    path = archive(tmp_path / "blimp.zip", PAIRS)
    options = ["--blimp", str(path), "--blimp-items", "2"]
    expected = lb.blimp(model, tokenizer, path, items=2, progress=False)
    assert main(["eval", str(tiny_llama), *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"blimp": expected._asdict()}
    assert main(["eval", str(checkpoint), *options]) == 0
    *rows, mean = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == sorted(PAIRS)
    assert mean.startswith("BLiMP accuracy ")
    assert mean.endswith("(mean of 2 paradigms, 4 pairs)")


def test_eval_blimp_and_text_prints_both(tiny_llama, tmp_path, capsys):
    path = archive(tmp_path / "blimp.zip", PAIRS)
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times")
    assert main(["eval", str(tiny_llama), "--blimp", str(path), "--text", str(text), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["blimp"]["pairs"] == 5
    assert result["scored"] == len(text.read_text()) - 1


def test_eval_kl_prints_the_divergence(tiny_llama, checkpoint, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times")
    options = ["eval", str(checkpoint), "--kl", str(tiny_llama), "--text", str(text)]
    assert main([*options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kl"] > 0
    assert main(options) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(
        f"perplexity {result['perplexity']:.4g}, original {result['original_perplexity']:.4g} on text.txt"
    )
    assert second.startswith(f"KL(original || model) {result['kl']:.4g} nats a token")
    assert main([*options[:3], "smollm2-0.1bit", *options[4:]]) == 2
    assert "--kl must name a model with the same tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--blimp", "{tmp}/missing.zip"], "missing.zip cannot be read as a folder or zip archive"),
        (["--blimp", "{model}/config.json"], "File is not a zip file"),
        (["--lm-eval", "blimp"], "pip install 'littlebit[eval]'"),
    ],
)
def test_eval_errors_say_what_to_do_and_exit_with_2(tiny_llama, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    options = [option.format(tmp=tmp_path, model=tiny_llama) for option in options]
    assert main(["eval", str(tiny_llama), *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_devices_that_torch_cannot_use_are_refused(tiny_llama, device, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["eval", str(tiny_llama), "--device", device])
    assert f"torch cannot use '{device}' here" in capsys.readouterr().err


@pytest.fixture
def fake_harness(monkeypatch):
    """Install a fake package lm_eval with the four names in use, and return the list of its calls."""
    calls = []

    class TaskManager:
        def __init__(self, include_path):
            calls.append(("include", include_path))

        def match_tasks(self, patterns):
            return sorted({task for task in ("arc", "blimp") for pattern in patterns if task.startswith(pattern)})

    def simple_evaluate(requests, tasks, task_manager, log_samples):
        calls.append((requests, tasks))
        assert isinstance(task_manager, TaskManager)
        return {"results": {task: {"acc,none": 0.5} for task in tasks}, "versions": {}, "samples": log_samples}

    parts = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **given: given},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.utils": {"make_table": lambda results, column: f"{column}: {sorted(results[column])}"},
    }
    for name, values in parts.items():
        module = ModuleType(name)
        vars(module).update(values, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            parent, _, child = name.rpartition(".")
            setattr(sys.modules[parent], child, module)
    return calls


def test_harness_gets_the_model_the_tasks_and_the_folder(fake_harness, model, tokenizer, tmp_path):
    result = zero_shot.harness(model, tokenizer, ["blimp", "a"], include=tmp_path, batch=3)
    request = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 3}
    assert fake_harness == [("include", str(tmp_path)), (request, ["arc", "blimp"])]
    assert result.results == {"results": {"arc": {"acc,none": 0.5}, "blimp": {"acc,none": 0.5}}, "versions": {}}
    assert result.table == "results: ['arc', 'blimp']"
    with pytest.raises(ValueError, match="has no task 'mmlu'"):
        zero_shot.harness(model, tokenizer, ["blimp", "mmlu"])
    with pytest.raises(ValueError, match="include must be a folder of YAML task files"):
        zero_shot.harness(model, tokenizer, ["blimp"], include=tmp_path / "missing")


def test_eval_lm_eval_prints_the_table_of_the_harness(fake_harness, checkpoint, capsys):
    assert main(["eval", str(checkpoint), "--lm-eval", "blimp,arc"]) == 0
    assert capsys.readouterr().out == "results: ['arc', 'blimp']\n"
    assert main(["eval", str(checkpoint), "--lm-eval", "blimp", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"lm_eval": {"results": {"blimp": {"acc,none": 0.5}}, "versions": {}}}


@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="needs lm-eval: pip install 'littlebit[eval]'")
def test_blimp_is_what_the_harness_measures(checkpoint, tmp_path):
    """The harness's own settings of its task blimp, on local pairs, with a packed model."""
    pairs = {
        "agreement": PAIRS["agreement"] * 3,
        "binding": [*PAIRS["binding"][:1], ("She goes", "She go"), ("x", "y")],
    }
    for name, group in pairs.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(line(*pair) for pair in group))
        template = os.path.join(importlib.util.find_spec("lm_eval").submodule_search_locations[0], "tasks/blimp")
        (tmp_path / f"{name}.yaml").write_text(
            f"include: {template}/_template_yaml\ntask: local_{name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{train: {tmp_path / name}.jsonl}}}}\n"
        )
    options = ["--blimp", archive(tmp_path / "blimp.zip", pairs), "--lm-eval", "local_*", "--lm-eval-include", tmp_path]
    printed = evaluated_beside_harness([checkpoint, *options], tmp_path)
    theirs = {name: printed["lm_eval"]["results"][f"local_{name}"]["acc,none"] for name in pairs}
    assert printed["blimp"]["paradigms"] == theirs
