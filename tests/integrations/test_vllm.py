"""vLLM with the plug-in writes what the CPU decoder writes; it runs in an environment of its own."""

import json
import os
import subprocess

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
    folder, prompts, processes, out = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=512, tensor_parallel_size=processes)
    found = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64))
    rows = [[list(each.prompt_token_ids), list(each.outputs[0].token_ids)] for each in found]
    open(out, "w").write(json.dumps(rows))
"""


@pytest.mark.skipif(PYTHON is None, reason="LITTLEBIT_VLLM_PYTHON names no interpreter that has vLLM and littlebit")
@pytest.mark.parametrize("processes", [1, 3])  # they must divide the nine heads
def test_vllm_writes_the_tokens_of_the_cpu_decoder(tmp_path, processes):
    folder, script, out = resolve("smollm2-0.55bit"), tmp_path / "script.py", tmp_path / "tokens.json"
    script.write_text(SCRIPT)
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    if processes > 1:  # vLLM binds each process to cores of its own, and there may be fewer cores
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    command = [PYTHON, script, folder, json.dumps(PROMPTS), str(processes), out]
    subprocess.run(command, check=True, env=environment)
    model, config, rows = map_model(folder), GenerationConfig(64, temperature=0.0), json.loads(out.read_text())
    assert len(rows) == len(PROMPTS)
    for prompt, tokens in rows:
        assert list(decode(model, prompt, config)) == tokens
