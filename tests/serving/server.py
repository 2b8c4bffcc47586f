"""A server in a fresh process, and the small model that it serves."""

import contextlib
import os
import re
import subprocess
import sys

import littlebit.fast as lb

TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}[assistant] "


def make_model(folder, positions=1024):
    """Write the tiny model of the package, packed, with a chat template; return its folder."""
    model, tokenizer = lb.load_model("tiny"), lb.load_tokenizer("tiny")
    model.config.max_position_embeddings = positions
    lb.quantize_(model, lb.Config(bits=1.5, paths=1), progress=False)
    tokenizer.chat_template = TEMPLATE
    return lb.save(model, folder, tokenizer)


@contextlib.contextmanager
def serving(folder, *options, environment=None):
    """Run `littlebit serve` on a free port; yield its address, the process, and the file with its output."""
    command = [sys.executable, "-m", "littlebit.fast", "serve", str(folder), "--port", "0", "--name", "tiny"]
    process = subprocess.Popen(
        [*command, *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {}),
    )
    try:
        first = process.stdout.readline()
        address = re.search(r"http://\S+?:\d+(?=/v1)", first)
        assert address, first + process.stdout.read()
        yield address.group(), process
    finally:
        process.terminate()
        process.communicate(timeout=30)
