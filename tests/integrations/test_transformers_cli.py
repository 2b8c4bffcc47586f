"""The command of transformers serves a packed model, asked by the `openai` client."""

import sys

import littlebit.fast as lb
import pytest
from server import listening

openai = pytest.importorskip("openai", reason="the client of the OpenAI API is not installed: pip install openai")
pytest.importorskip("fastapi", reason="its server needs more: pip install 'transformers[serving]'")


def test_transformers_serves_a_packed_model(chat_model):
    command = [sys.executable, "-m", "littlebit.fast.integrations.transformers_cli", "serve", "--device", "cpu"]
    command += ["--dtype", "float32", "--port", "0", "--log-level", "info"]
    messages = [{"role": "user", "content": "Hi"}]
    asked = {"model": str(chat_model), "messages": messages, "max_tokens": 16, "temperature": 0}
    with (
        listening(command) as (address, _),
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120) as client,
    ):
        chunks = client.chat.completions.create(**asked, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == lb.generate(lb.load(chat_model), "[user] Hi\n[assistant] ", 16, temperature=0.0)
