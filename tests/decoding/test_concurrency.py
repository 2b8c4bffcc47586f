"""Many threads and processes at once give the same results, to the bit, as one after the other, without deadlock."""

import concurrent.futures
import copy
import json
import subprocess
import sys

import littlebit.fast as lb
import pytest
import torch
from compare import assert_same
from littlebit.fast.bench.linear import random_path
from littlebit.fast.files.digests import tensors_digest
from littlebit.fast.kernels import cpu_threads
from littlebit.fast.models.layers import PackedLinear

THREADS, PROCESSES = 8, 4
TIMEOUT_S = 400
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Small layers use several threads too, and the number of threads is put back."""
    monkeypatch.setattr(cpu_threads, "PARALLEL_WORK", 0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, tmp_path_factory):
    model = lb.load_model(tiny_llama)
    lb.quantize_(model, lb.Config(bits=2.5), progress=False)
    return lb.save(model, tmp_path_factory.mktemp("concurrency") / "out", lb.load_tokenizer(tiny_llama))


def in_threads(work, items):
    """What the work gives for each item, all at once."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, items, timeout=TIMEOUT_S))


def make_layers():
    generator = torch.Generator().manual_seed(0)
    shapes = [(70, 90, 20), (128, 64, 33), (31, 200, 7), (256, 256, 64)]
    return [PackedLinear([random_path(*shape, generator), random_path(*shape, generator)]) for shape in shapes]


def make_inputs(layers):
    generator = torch.Generator().manual_seed(1)
    sizes = [(layer, rows, dtype) for layer in layers for rows in (1, 5, 40) for dtype in DTYPES]
    return [(layer, torch.randn(rows, layer.d_in, generator=generator).to(dtype)) for layer, rows, dtype in sizes]


def test_layers_in_threads_of_all_dtypes_and_thread_counts():
    cases = make_inputs(make_layers())
    with torch.inference_mode():
        torch.set_num_threads(1)
        expected = [layer(x) for layer, x in cases]

        def work(at):
            torch.set_num_threads(1 + at % 3)
            with torch.inference_mode():
                return cases[at % len(cases)][0](cases[at % len(cases)][1])

        for at, y in enumerate(in_threads(work, range(4 * len(cases)))):
            assert y.dtype == expected[at % len(cases)].dtype
            assert_same(y.float(), expected[at % len(cases)].float())


def test_a_model_loads_and_writes_in_threads(checkpoint):
    """One model for all, and one each, loaded at the same time."""
    model, tokenizer = lb.load(checkpoint), lb.load_tokenizer(checkpoint)
    cases = [(f"prompt {at}", cache, 0.0 if at % 2 else 1.0) for at, cache in enumerate(("full", "latent") * 4)]

    def write(each, case):
        prompt, cache, temperature = case
        return lb.generate(each, prompt, 8, temperature, seed=3, tokenizer=tokenizer, kv_cache=cache)

    greedy = [case for case in cases if not case[2]]
    expected = [write(model, case) for case in greedy]
    assert in_threads(lambda case: write(model, case), greedy) == expected
    assert in_threads(lambda case: write(lb.load(checkpoint), case), greedy) == expected


def test_quantize_in_threads(tiny_llama):
    model = lb.load_model(tiny_llama)

    def work(config):
        mine = copy.deepcopy(model)
        lb.quantize_(mine, config, progress=False)
        return tensors_digest(*lb.pack_(mine).state_dict().values())

    configs = [lb.Config(bits=2.5, init=init, seed=seed) for init in ("dual-svid", "itq", "admm") for seed in (0, 1)]
    torch.set_num_threads(1)
    assert in_threads(work, configs) == [work(config) for config in configs]


# What a process computes: layers, a text and a quantised model; the same program for all ways to start one
WORK = """
import json, sys, warnings
warnings.simplefilter("ignore")
sys.path[:0] = [{tests!r}, {tests!r} + '/..']
import torch
import littlebit.fast as lb
from littlebit.fast.files.digests import tensors_digest
from littlebit.fast.kernels import cpu_threads
cpu_threads.PARALLEL_WORK = 0

def work(checkpoint, dense, threads):
    from test_concurrency import make_inputs, make_layers
    torch.set_num_threads(threads)
    with torch.inference_mode():
        layers = tensors_digest(*(layer(x) for layer, x in make_inputs(make_layers())))
    model = lb.load_model(dense)
    lb.quantize_(model, lb.Config(bits=2.5), progress=False)
    text = lb.generate(lb.load(checkpoint), "prompt", 8, tokenizer=lb.load_tokenizer(checkpoint))
    return [layers, tensors_digest(*lb.pack_(model).state_dict().values()), text]
"""
ALONE = "print(json.dumps(work(sys.argv[1], sys.argv[2], int(sys.argv[3]))))"
FORKED = """
import os
layer, x = __import__("test_concurrency").make_inputs(__import__("test_concurrency").make_layers())[-6]
torch.set_num_threads(2)
layer(x)  # there are helpers now, and a child of fork has none of them, nor of OpenMP's
first = work(sys.argv[1], sys.argv[2], 1)
for asked in (1, 2):
    child = os.fork()
    if child == 0:
        os._exit(0 if work(sys.argv[1], sys.argv[2], 1) == first and (torch.set_num_threads(asked) or True)
                 and torch.equal(layer(x), layer(x)) else 1)
    assert os.waitpid(child, 0)[1] == 0, "the child failed"
print(json.dumps(first))
"""
WORKERS = """
from torch.utils.data import DataLoader, Dataset

class Rows(Dataset):
    def __init__(self, checkpoint):
        self.checkpoint, self.model = checkpoint, None
    def __len__(self):
        return 8
    def __getitem__(self, at):
        self.model = self.model or lb.load(self.checkpoint)
        with torch.inference_mode():
            return self.model(torch.tensor([[at, at + 1, 5]])).logits[0]

if __name__ == "__main__":
    rows = Rows(sys.argv[1])
    torch.set_num_threads(2)
    expected = torch.stack([rows[at] for at in range(8)])
    for how in ("fork", "spawn"):
        loader = DataLoader(Rows(sys.argv[1]), batch_size=4, num_workers=2, multiprocessing_context=how)
        assert torch.equal(torch.cat(list(loader)), expected), how
    print(json.dumps("same"))
"""


def started(program, tmp_path, *arguments):
    """A process that runs a program after WORK."""
    script = tmp_path / "program.py"
    script.write_text(WORK.format(tests=str(__file__).rpartition("/")[0]) + program)
    command = [sys.executable, "-W", "ignore", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process):
    """What it printed, once it has ended; a deadlock fails."""
    try:
        out, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return json.loads(out.splitlines()[-1])


def test_processes_at_once_and_forked_ones_compute_the_same(checkpoint, tiny_llama, tmp_path):
    processes = [started(ALONE, tmp_path, checkpoint, tiny_llama, 1 + at % 2) for at in range(PROCESSES)]
    found = [answer(process) for process in processes]
    layers, _, text = found[0]
    assert [each[0] for each in found] == [layers] * PROCESSES
    assert [each[2] for each in found] == [text] * PROCESSES
    # torch's own decompositions may depend on the number of threads
    assert found[0][1] == found[2][1]
    assert found[1][1] == found[3][1]
    assert answer(started(FORKED, tmp_path, checkpoint, tiny_llama)) == found[0]


def test_workers_of_data_loaders_compute_the_same(checkpoint, tmp_path):
    assert answer(started(WORKERS, tmp_path, checkpoint)) == "same"
