"""lm-evaluation-harness measures a model through `littlebit serve`, offline."""

import importlib.util
import json
import os
import subprocess
import sys

import littlebit.fast as lb
import pytest
import torch
from server import serving

if not importlib.util.find_spec("lm_eval"):
    pytest.skip("needs lm-eval: pip install 'lm-eval[api]'", allow_module_level=True)
pytest.importorskip("uvicorn", reason="the extra is not installed: pip install 'littlebit[serve]'")

DOCUMENTS = [
    {"context": context, "choices": [" the house", " of a", " xyz", " and said"]}
    for context in ("It was", "The war", "I went to", "Four score and", "In the year", "He saw the", "She", "When they")
]
TASK = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{context}}}}"
doc_to_target: {target}
target_delimiter: ""
"""


def harness(folder, kind, target, *options):
    """Run the harness on the documents as a user would; return a list of what was answered for each."""
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    (folder / "choices.yaml").write_text(TASK.format(file=folder / "documents.jsonl", kind=kind, target=target))
    command = [sys.executable, "-m", "lm_eval", "--include_path", folder, "--tasks", "choices", "--log_samples"]
    command += ["--output_path", folder / "out", *options]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ | offline)
    assert done.returncode == 0, done.stderr
    (file,) = (folder / "out").rglob("samples_choices_*.jsonl")
    rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
    return [row["filtered_resps"] for row in rows]


def test_the_harness_finds_the_likeliest_choices(chat_model, tmp_path):
    model, tokenizer, expected = lb.load(chat_model), lb.load_tokenizer(chat_model), []
    for document in DOCUMENTS:
        scores, begin = [], len(tokenizer(document["context"])["input_ids"])
        for choice in document["choices"]:
            tokens = torch.tensor(tokenizer(document["context"] + choice)["input_ids"])
            with torch.inference_mode():
                scored = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(-1, tokens[1:, None])
            scores.append(float(scored[begin - 1 :].sum()))
        expected.append(max(range(4), key=scores.__getitem__))
    with serving(chat_model) as (address, _):
        arguments = f"model=tiny,base_url={address}/v1/completions,tokenizer={chat_model},num_concurrent=4"
        options = ["--model", "local-completions", "--model_args", arguments, "--batch_size", "4"]
        found = harness(tmp_path, "multiple_choice", '0\ndoc_to_choice: "{{choices}}"', *options)
    assert [max(range(4), key=lambda at: float(each[at][0])) for each in found] == expected


def test_the_harness_reads_chats(chat_model, tmp_path):
    with serving(chat_model) as (address, _):
        arguments = f"model=tiny,base_url={address}/v1/chat/completions"
        options = ["--model", "local-chat-completions", "--model_args", arguments, "--apply_chat_template"]
        options += ["--gen_kwargs", "max_gen_toks=8,temperature=0,until=zzzz"]
        found = harness(tmp_path, "generate_until", '"{{context}}"', *options)
    model = lb.load(chat_model)
    prompts = [f"[user] {each['context']}\n[assistant] " for each in DOCUMENTS]
    assert [each[0] for each in found] == [lb.generate(model, prompt, 8, temperature=0.0) for prompt in prompts]
