"""Ask a server 2000 times from 32 clients, some of which leave; no answer may be lost or mixed up, and memory is flat.

Run `make soak-serve REQUESTS=2000`. A tenth of the requests are malformed and must be refused with the status that
belongs to the mistake. A tenth of the clients leave in the middle of a stream. All others must get, token for token,
the text that the decoder writes for the same prompt and settings in this process. At the end nothing may still run,
and the server's resident memory may have grown by 5 % since a fifth of the requests.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import littlebit.fast as lb
import openai
from littlebit.fast.decoding.mapped_weights import map_model
from littlebit.fast.decoding.tokenizer import Tokenizer

sys.path.append(str(Path(__file__).parents[1] / "serving"))
from server import make_model, serving

CLIENTS, GROWTH = 32, 0.05
PROMPTS = ("It was the best of times", "Four score and seven years ago", "x", "The whale, the whale!", "A" * 90)
MALFORMED = (
    ({"messages": []}, 400),
    ({"messages": [{"role": "user"}]}, 400),
    ({"model": "other"}, 404),
    ({"temperature": -3}, 400),
    ({"max_tokens": 10**6}, 400),
    ({"logit_bias": {"5": 1}}, 400),
    ({"unknown": 1}, 400),
)


class Soak:
    """The clients, and what they counted."""

    def __init__(self, client, expected, process, requests, seed):
        self.client, self.expected, self.process = client, expected, process
        self.left, self.random = requests, random.Random(seed)
        self.requests, self.done, self.counts, self.memory = requests, 0, {}, []

    def count(self, what):
        self.counts[what] = self.counts.get(what, 0) + 1
        self.done += 1
        if self.done % max(self.requests // 50, 1) == 0:
            self.memory.append(resident(self.process.pid))

    async def run(self):
        while self.left > 0:
            self.left -= 1
            choice = self.random.random()
            if choice < 0.1:
                await self.malformed()
            else:
                await self.ask(leaves=choice < 0.2)

    async def malformed(self):
        change, status = self.random.choice(MALFORMED)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4} | change
        try:
            await self.client.post("/chat/completions", body=body, cast_to=object)
        except openai.APIStatusError as refusal:
            found = refusal
        else:
            raise AssertionError(f"{change} was not refused")
        assert (found.status_code, bool(found.body["message"])) == (status, True), (change, found)
        self.count("refused")

    async def ask(self, leaves):
        at, seed, count = self.random.randrange(len(PROMPTS)), self.random.randrange(3), self.random.choice((8, 24))
        temperature, stream = (0.0 if seed == 0 else 0.9), leaves or self.random.random() < 0.5
        asked = {"model": "tiny", "prompt": PROMPTS[at], "max_tokens": count, "temperature": temperature, "seed": seed}
        while True:
            try:
                answer = await self.client.completions.create(**asked, stream=stream, extra_body={"ignore_eos": True})
                break
            except openai.RateLimitError:
                self.counts["429"] = self.counts.get("429", 0) + 1
                await asyncio.sleep(0.05)
        text = ""
        if stream:
            async for chunk in answer:
                text += chunk.choices[0].text
                if leaves and text:
                    await answer.close()
                    break
        else:
            text = answer.choices[0].text
        expected = self.expected(PROMPTS[at], count, temperature, seed)
        assert expected.startswith(text) if leaves else text == expected, (asked, text, expected)
        self.count("left" if leaves else "answered")


def resident(process):
    """Resident memory of a process in bytes, of which no file is the source."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


def make_expected(folder):
    """A function that generates in this process, once for each prompt and settings."""
    model, tokenizer, known = map_model(folder), Tokenizer(folder), {}

    def expected(prompt, count, temperature, seed):
        key = prompt, count, temperature, seed
        if key not in known:
            config = lb.GenerationConfig(count, temperature, seed=seed, stop_tokens=())
            known[key] = lb.generate(model, prompt, tokenizer=tokenizer, config=config)
        return known[key]

    for prompt in PROMPTS:
        for count in (8, 24):
            for seed in range(3):
                expected(prompt, count, 0.0 if seed == 0 else 0.9, seed)
    return expected


async def soak(address, process, expected, requests, seed):
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300) as client:
        state = Soak(client, expected, process, requests, seed)
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(state.run())
    return state


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="record this run in book/results/reliability.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(f"{folder}/model")
        expected = make_expected(model)
        with serving(model, "--queue", 16, "--batch", 8, "--context", 256) as (address, process):
            begin = time.monotonic()
            state = asyncio.run(soak(address, process, expected, arguments.requests, arguments.seed))
            seconds = time.monotonic() - begin
            time.sleep(1)
            metrics = urllib.request.urlopen(f"{address}/metrics").read().decode()
    for name in ("littlebit_running 0.0", "littlebit_waiting 0.0"):
        assert name in metrics, metrics
    first, last = state.memory[len(state.memory) // 5], state.memory[-1]
    found = {"seconds": round(seconds), "requests": arguments.requests, "clients": CLIENTS} | state.counts
    found |= {"resident_bytes_first": first, "resident_bytes_last": last, "growth": last / first - 1}
    print(json.dumps(found, indent=1))
    assert sum(state.counts.get(name, 0) for name in ("answered", "left", "refused")) == arguments.requests
    if arguments.save:
        from record import record

        record("soak-serve", found)
    if found["growth"] > GROWTH:
        sys.exit(f"the server's memory grew by {found['growth']:.1%}")


if __name__ == "__main__":
    main()
