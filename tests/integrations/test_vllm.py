"""vLLM with the plug-in writes what the CPU decoder writes; it runs in an environment of its own."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from littlebit.fast.checkpoints.fetch import resolve
from littlebit.fast.decoding.cpu_decoder import decode
from littlebit.fast.decoding.mapped_weights import map_model
from littlebit.fast.models.generation_settings import GenerationConfig

PYTHON = os.environ.get("LITTLEBIT_VLLM_PYTHON")
PROMPTS = [
    "In the beginning of the twentieth century,",
    "The sea is",
    "Once upon a time there was a king who",
    "The capital of France is",
    "Water boils when",
    "He opened the door and",
    "The most important thing in science is",
    "Four score and seven years ago",
    "A good friend",
    "The history of the city",
]
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, prompts, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=512)
    found = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64))
    rows = [[list(each.prompt_token_ids), list(each.outputs[0].token_ids)] for each in found]
    open(out, "w").write(json.dumps(rows))
"""


@pytest.mark.skipif(PYTHON is None, reason="LITTLEBIT_VLLM_PYTHON names no interpreter that has vLLM and littlebit")
def test_vllm_writes_the_tokens_of_the_cpu_decoder(tmp_path):
    folder, script, out = resolve("smollm2-0.55bit"), tmp_path / "script.py", tmp_path / "tokens.json"
    script.write_text(SCRIPT)
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([PYTHON, script, folder, json.dumps(PROMPTS), out], check=True, env=environment)
    model, config = map_model(folder), GenerationConfig(64, temperature=0.0)
    for prompt, tokens in json.loads(Path(out).read_text()):
        assert list(decode(model, prompt, config)) == tokens
