"""`littlebit serve` as in a container: a read-only root, no network, and a start in seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from server import serving

pytest.importorskip("uvicorn", reason="the extra is not installed: pip install 'littlebit[serve]'")

# Only the folder with the compiled kernels, the first argument, can be written.
BOX = 'mount --make-rprivate / && mount --bind "$1" "$1" && mount -o remount,bind,ro / && ip link set lo up || exit 9'
INSIDE = """
import json, os, re, subprocess, sys, urllib.request

assert not os.access(sys.argv[1], os.W_OK)
command = [sys.executable, "-m", "littlebit.fast", "serve", sys.argv[1], "--port", "0", "--name", "tiny"]
command.append("--log-requests")
server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
first = server.stdout.readline()
address = re.search(r"http://\\S+?:\\d+(?=/v1)", first)
assert address, first + server.stdout.read()
assert urllib.request.urlopen(address.group() + "/health").status == 200
ticks = open(f"/proc/{server.pid}/stat").read().rpartition(")")[2].split()[11:13]
seconds = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
body = {"model": "tiny", "prompt": "It was", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
request = urllib.request.Request(address.group() + "/v1/completions", json.dumps(body).encode())
request.add_header("Content-Type", "application/json")
text = json.load(urllib.request.urlopen(request))["choices"][0]["text"]
server.terminate()
print(json.dumps({"seconds": seconds, "text": text, "log": server.communicate()[0]}))
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount")
def test_starts_in_seconds_on_a_read_only_root_without_network(chat_model):
    with serving(chat_model):
        pass  # compiles the kernels where no earlier test has
    compiled = os.environ.get("NUMBA_CACHE_DIR") or str(Path(__file__).parents[2] / "fast")
    command = ["unshare", "--mount", "--net", "sh", "-c", f'{BOX}; shift; exec "$@"', "sh", compiled]
    command += [sys.executable, "-c", INSIDE, str(chat_model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 9:
        pytest.skip(f"nothing can be mounted here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["text"]
    assert found["seconds"] < 5  # of the processor, which other programs change less than the clock
    (line,) = [json.loads(line) for line in found["log"].splitlines() if line.startswith("{")]
    assert (line["path"], line["status"], line["new_tokens"]) == ("/v1/completions", 200, 4)
