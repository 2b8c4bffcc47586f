"""Test the seven multiple-choice tasks: their prompts, a plain loop over choices, damaged lines, and the harness."""

import importlib.util
import json
import math
import os

import littlebit.fast as lb
import numpy as np
import pytest
import torch
from beside_harness import evaluated_beside_harness
from hypothesis import given, settings, strategies as st
from littlebit.fast.cli.main import main
from littlebit.fast.evaluation import tasks

#: One item of each task: its line, the contexts, and the endings.
ITEMS = {
    "winogrande": (
        {"context_options": ["The cup held Ann", "The cup held tea "], "continuation": "hot.", "gold": 1},
        ["The cup held Ann", "The cup held tea "],
        [" hot.", " hot."],
    ),
    "hellaswag": (
        {"query": "Roof: A man sits. the man", "choices": ["sings.", "falls off."], "gold": 0},
        ["Roof: A man sits. The man"] * 2,
        [" sings.", " falls off."],
    ),
    "openbook_qa": (
        {"query": "Frogs eat", "choices": ["flies", "cars", "hay"], "gold": 0},
        ["Frogs eat"] * 3,
        [" flies", " cars", " hay"],
    ),
    "boolq": (
        {"query": "Passage: Ice floats.\nQuestion: does ice float?", "choices": ["no", "yes"], "gold": 1},
        ["Ice floats.\nQuestion: does ice float?\nAnswer:"] * 2,
        [" no", " yes"],
    ),
    "piqa": (
        {"query": "Question: open a jar\n", "choices": ["turn the lid", "turn the table"], "gold": 0},
        ["Question: open a jar\nAnswer:"] * 2,
        [" turn the lid", " turn the table"],
    ),
    "arc_easy": (
        {"query": "Question: Which is red?", "choices": ["a rose", "grass"], "gold": 0},
        ["Question: Which is red?\nAnswer:"] * 2,
        [" a rose", " grass"],
    ),
    "arc_challenge": (
        {"query": "Question: Why is it?", "choices": ["é", "no", "no"], "gold": 2},
        ["Question: Why is it?\nAnswer:"] * 3,
        [" é", " no", " no"],
    ),
}
#: The same kinds of items as the harness's data sets hold them, two or more of each task.
ORIGINALS = {
    "winogrande": [
        {
            "sentence": "The cup fell off the shelf as the _ was wet.",
            "option1": "cup",
            "option2": "shelf",
            "answer": "2",
        },
        {"sentence": "Ann thanked Bea since _ helped.", "option1": "Ann", "option2": "Bea", "answer": "2"},
    ],
    "hellaswag": [
        {
            "activity_label": "Roof",
            "ctx_a": "A man sits.",
            "ctx_b": "the man",
            "endings": ["a", "b c", "d"],
            "label": "1",
        },
        {
            "activity_label": "Food",
            "ctx_a": "Bread rises.",
            "ctx_b": "",
            "endings": ["Eat.", "It is it."],
            "label": "0",
        },
    ],
    "openbook_qa": [
        {"question_stem": "Frogs eat", "choices": {"text": ["flies", "a car"], "label": ["A", "B"]}, "answerKey": "A"},
        {
            "question_stem": "Day is",
            "choices": {"text": ["dark", "long", "é"], "label": ["A", "B", "C"]},
            "answerKey": "C",
        },
    ],
    "boolq": [
        {"passage": "Ice floats on water.", "question": "does ice float", "label": 1},
        {"passage": "A cat -- A cat sleeps.", "question": "is a cat a dog", "label": 0},
    ],
    "piqa": [
        {"goal": "open a jar", "sol1": "turn the lid", "sol2": "turn the table", "label": 0},
        {"goal": "dry a cup", "sol1": "use  water", "sol2": "use a towel, then wait", "label": 1},
    ],
    "arc_easy": [
        {"question": "What is red?", "choices": {"text": ["a rose", "grass"], "label": ["A", "B"]}, "answerKey": "A"},
        {
            "question": "What is it?",
            "choices": {"text": ["no", "no", "yes"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
    ],
}
ORIGINALS["arc_challenge"] = ORIGINALS["arc_easy"][::-1]
#: Task -> the harness's file that defines it.
DEFINITIONS = {
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "openbook_qa": "openbookqa/openbookqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
}


@pytest.fixture(scope="module")
def model(tiny_llama):
    return lb.load_model(tiny_llama, dtype=torch.float64)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return lb.load_tokenizer(tiny_llama)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tasks")


def write(folder, lines):
    """Write lists of lines as NAME.jsonl."""
    folder.mkdir(exist_ok=True)
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def line_of(name, doc):
    """Convert an item of the harness's data sets to the line of a task's file."""
    if name == "winogrande":
        before, after = doc["sentence"].split("_")
        gold = int(doc["answer"]) - 1
        contexts = [before + doc["option1"], before + doc["option2"]]
        return {"context_options": contexts, "continuation": after.strip(), "gold": gold}
    if name == "hellaswag":
        query = f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b']}".strip()
        return {"query": query, "choices": doc["endings"], "gold": int(doc["label"])}
    if name == "boolq":
        query = f"Passage: {doc['passage']}\nQuestion: {doc['question']}?"
        return {"query": query, "choices": ["no", "yes"], "gold": doc["label"]}
    if name == "piqa":
        return {"query": f"Question: {doc['goal']}\n", "choices": [doc["sol1"], doc["sol2"]], "gold": doc["label"]}
    query = doc["question_stem"] if name == "openbook_qa" else f"Question: {doc['question']}"
    gold = doc["choices"]["label"].index(doc["answerKey"])
    return {"query": query, "choices": doc["choices"]["text"], "gold": gold}


def plain_scores(model, tokenizer, item):
    """Log-probability of each choice's tokens, one choice at a time."""
    scores = []
    for context, ending in item.pairs:
        start, whole = tokenizer.encode(context.rstrip()), tokenizer.encode(context + ending)
        with torch.inference_mode():
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        scores.append(sum(logits[at - 1, whole[at]].item() for at in range(len(start), len(whole))))
    return scores


@pytest.mark.parametrize("name", ITEMS)
def test_prompts_are_written_as_the_harness_writes_them(name, tmp_path):
    row, contexts, endings = ITEMS[name]
    (item,) = tasks.read_tasks(write(tmp_path, {name: [row]}))[name]
    assert item.pairs == tuple(zip(contexts, endings, strict=True))
    assert item.lengths == tuple(len(choice) for choice in row.get("choices", row.get("context_options")))
    assert item.gold == row["gold"]


@pytest.mark.parametrize(
    ("query", "context"),
    [
        ("Roof: A man sits. he", "Roof: A man sits. He"),
        ("Roof: He asks why? then he", "Roof: He asks why? Then he"),
        ("Roof: A man sits. He falls.", "Roof: A man sits. He falls."),
        ("Sax: 1 a man plays. 2 a guy", "Sax: 1 a man plays. 2 a guy"),
    ],
)
def test_hellaswag_capitalizes_the_unfinished_sentence(query, context):
    assert tasks.capitalized(query) == context


texts = st.text("abc dé.", min_size=1, max_size=9).filter(str.strip)
rows = st.fixed_dictionaries({"query": texts, "choices": st.lists(texts, min_size=2, max_size=4), "gold": st.just(1)})


@settings(max_examples=20)
@given(lines=st.dictionaries(st.sampled_from(["piqa", "boolq", "hellaswag"]), st.lists(rows, min_size=1, max_size=3)))
def test_scores_are_those_of_one_choice_at_a_time(model, tokenizer, folder, lines):
    for file in folder.glob("*.jsonl"):
        file.unlink()
    read = {name: group for name, group in lines.items() if group}
    if not read:
        read = {"piqa": [{"query": "a", "choices": ["b", "c"], "gold": 1}]}
    path = write(folder, read)
    found = lb.score_tasks(model, tokenizer, path, progress=False)
    assert found == lb.score_tasks(model, tokenizer, path, batch=7, progress=False)
    assert list(found.tasks) == [name for name in tasks.TASKS if name in read]
    for name, items in tasks.read_tasks(path).items():
        right, right_norm = [], []
        for item in items:
            scores = np.array(plain_scores(model, tokenizer, item)).round(9)
            right.append(np.argmax(scores) == item.gold)
            right_norm.append(np.argmax((scores / item.lengths).round(9)) == item.gold)
        score = found.tasks[name]
        assert score.acc == np.mean(right)
        assert score.acc_norm == (None if name == "boolq" else np.mean(right_norm))
        assert math.isclose(score.chance, np.mean([1 / len(item.pairs) for item in items]))
        if len(items) > 1:
            assert math.isclose(score.acc_stderr, np.std(right, ddof=1) / math.sqrt(len(items)), abs_tol=1e-12)


def test_contexts_longer_than_the_model_lose_their_beginning(model, tokenizer):
    positions = 12
    row = tasks.encode(tokenizer, [("x" * 40, " yes")], positions)["x" * 40, " yes"]
    whole = tokenizer.encode("x" * 40 + " yes")
    assert row == (tuple(whole[-positions - 1 :]), len(whole) - len(tokenizer.encode("x" * 40)))
    with pytest.raises(ValueError, match="needs 4 positions, but the model has 3"):
        tasks.encode(tokenizer, [("x", " yes")], 3)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "JSONDecodeError"),
        (json.dumps({"query": "a", "choices": ["b", "c"]}), "KeyError('gold')"),
        (json.dumps({"query": "a", "choices": ["b"], "gold": 0}), "number of choices is not from 2 to 64"),
        (json.dumps({"query": "a", "choices": "bc", "gold": 0}), "number of choices is not from 2 to 64"),
        (json.dumps({"query": "a", "choices": ["b", "c"], "gold": 2}), "gold is not the index of a choice: 2"),
        (json.dumps({"query": "a", "choices": ["b", ""], "gold": 0}), "a text is empty"),
        (json.dumps({"query": 1, "choices": ["b", "c"], "gold": 0}), "not a text"),
    ],
)
def test_damaged_items_are_named(tmp_path, line, reason):
    path = write(tmp_path / "in", {"piqa": [ITEMS["piqa"][0]]})
    with (path / "piqa.jsonl").open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(ValueError, match="with query, choices and gold") as caught:
        tasks.read_tasks(path)
    assert str(caught.value).startswith(f"{path}: piqa.jsonl, line 3 is not an item of piqa (")
    assert reason in str(caught.value)
    assert len(tasks.read_tasks(path, items=1)["piqa"]) == 1


def test_folders_without_tasks_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no task: there must be a file winogrande\.jsonl"):
        tasks.read_tasks(write(tmp_path / "other", {"copa": [{}]}))
    with pytest.raises(ValueError, match=r"boolq\.jsonl holds no items"):
        tasks.read_tasks(write(tmp_path / "empty", {"boolq": []}))


def test_eval_tasks_prints_accuracies(tiny_llama, tmp_path, capsys):
    path = write(tmp_path, {name: [row] * 3 for name, (row, _, _) in ITEMS.items()})
    assert main(["eval", str(tiny_llama), "--tasks", str(path), "--tasks-items", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["tasks"]
    assert {name: each["items"] for name, each in printed["tasks"].items()} == dict.fromkeys(tasks.TASKS, 2)
    assert math.isclose(printed["mean_acc"], np.mean([each["acc"] for each in printed["tasks"].values()]))
    assert main(["eval", str(tiny_llama), "--tasks", str(path)]) == 0
    head, *rows, mean = capsys.readouterr().out.splitlines()
    assert head.split() == ["task", "items", "chance", "acc", "acc_norm"]
    assert [row.split()[0] for row in rows] == list(tasks.TASKS)
    assert mean.split()[:3] == ["mean", "of", "7"]


@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="needs lm-eval: pip install 'littlebit[eval]'")
def test_tasks_are_what_the_harness_measures(tiny_llama, tmp_path):
    """The harness's own definitions of the seven tasks, on local items in the form of its data sets."""
    root = os.path.join(importlib.util.find_spec("lm_eval").submodule_search_locations[0], "tasks")
    include = write(tmp_path / "include", ORIGINALS)
    for name, definition in DEFINITIONS.items():
        data = include / f"{name}.jsonl"
        (include / f"{name}.yaml").write_text(
            f"include: {root}/{definition}\ntask: local_{name}\ntag: null\ndataset_path: json\ndataset_name: null\n"
            f"training_split: null\ndataset_kwargs: {{data_files: {{validation: {data}, test: {data}}}}}\n"
        )
    lines = {name: [line_of(name, doc) for doc in docs] for name, docs in ORIGINALS.items()}
    options = ["--tasks", write(tmp_path / "in", lines), "--lm-eval", "local_*", "--lm-eval-include", include]
    printed = evaluated_beside_harness([tiny_llama, *options], tmp_path)
    for name, ours in printed["tasks"]["tasks"].items():
        theirs = printed["lm_eval"]["results"][f"local_{name}"]
        for metric in ("acc", "acc_norm"):
            assert (ours[metric] is None) == (f"{metric},none" not in theirs)
            if ours[metric] is not None:
                assert ours[metric] == theirs[f"{metric},none"]
                assert math.isclose(ours[f"{metric}_stderr"], theirs[f"{metric}_stderr,none"])
