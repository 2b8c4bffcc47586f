"""A server in a fresh process, and the small model that it serves."""

import contextlib
import os
import re
import subprocess
import sys
import threading

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
    """Run `littlebit serve` on a free port; yield its address, and the process."""
    command = [sys.executable, "-m", "littlebit.fast", "serve", str(folder), "--port", "0", "--name", "tiny"]
    with listening([*command, *map(str, options)], environment) as found:
        yield found


@contextlib.contextmanager
def listening(command, environment=None):
    """Run a server that writes its address when it is ready; yield that, and the process."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | (environment or {}),
    )
    try:
        written = ""
        while not (address := re.search(r"http://[\w.]+:\d+", written)):
            line = process.stdout.readline()
            assert line, written
            written += line
        reader = threading.Thread(target=process.stdout.read)  # else a full pipe stops the server
        reader.start()
        yield address.group(), process
        process.terminate()
        reader.join(30)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
