"""Test the layers with torch's own tools: compile, export, autocast, FSDP, state dicts, copies and pickles."""

import copy
import pickle
import subprocess
import sys

import littlebit.fast as lb
import pytest
import torch
from compare import assert_same
from conftest import make_tiny_llama
from littlebit.fast.linear import folded
from littlebit.fast.models.embeddings import quantize_embeddings_
from littlebit.fast.models.layers import LittleBitLinear, PackedLinear

# torch's compiler uses what torch itself deprecates
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TOKENS = (torch.arange(24)[None] * 5) % 256


@pytest.fixture
def trained(tiny_llama):
    model = lb.load_model(tiny_llama)
    lb.quantize_(model, lb.Config(bits=2.5), progress=False)
    return model


def layer(bias=True):
    torch.manual_seed(0)
    paths = [lb.Factors(*(torch.randn(size) for size in ((40, 9), (50, 9), (40,), (9,), (50,)))) for _ in range(2)]
    return LittleBitLinear(paths, torch.randn(40) if bias else None)


def compiled(module, backend="aot_eager", **options):
    torch.compiler.reset()
    return torch.compile(module, fullgraph=True, backend=backend, **options)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("bias", [True, False])
def test_compile_takes_the_layers_whole(bias, backend):
    module = layer(bias)
    packed = compiled(module.pack(), backend, dynamic=True)
    with torch.no_grad():
        for shape in ((50,), (3, 50), (2, 7, 50)):
            x = torch.randn(shape)
            assert_same(packed(x), module.pack()(x))
    if backend == "aot_eager":
        x = torch.randn(3, 50, requires_grad=True)
        gradients = []
        for each in (module, compiled(module), module.pack(), compiled(module.pack())):
            gradients.append(torch.autograd.grad(each(x).square().sum(), x)[0])
        assert_same(gradients[0], gradients[1])
        assert_same(gradients[2], gradients[3])


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_compile_takes_a_packed_model_whole(bits, trained):
    quantize_embeddings_(trained, bits)
    model = lb.pack_(trained)
    with torch.no_grad():
        expected = model(TOKENS, use_cache=False).logits
        assert_same(compiled(model)(TOKENS, use_cache=False).logits, expected)


def test_compile_takes_a_training_step_whole(trained):
    gradients = []
    for model in (trained, compiled(copy.deepcopy(trained))):
        model(TOKENS, use_cache=False).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for mine, theirs in zip(*gradients, strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize("bias", [True, False])
def test_export_keeps_the_packed_layer_and_any_number_of_rows(bias, tmp_path):
    packed = layer(bias).pack()
    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(packed, (torch.randn(3, 50),), dynamic_shapes=({0: rows},))
    assert any("packed_linear" in str(node.target) for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    x = torch.randn(17, 50)
    assert_same(loaded(x), packed(x))


def test_autocast_trains_and_runs(trained):
    with torch.autocast("cpu", torch.bfloat16):
        loss = trained(TOKENS, labels=TOKENS).loss
    loss.backward()
    for module in trained.modules():
        if isinstance(module, LittleBitLinear):
            for parameter in module.parameters():
                assert parameter.grad.dtype == parameter.dtype == torch.float32
                assert torch.isfinite(parameter.grad).all()
    module, x = layer(), torch.randn(3, 50)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        a, b = (factor.bfloat16() for factor in folded(module.factors()))
        t = torch.nn.functional.linear(x.bfloat16(), a)
        assert_same(module(x).float(), torch.nn.functional.linear(t, b, module.bias.bfloat16()).float())
        assert_same(module.pack()(x), layer().pack()(x))  # accumulates in float32, whatever is asked for
        assert torch.isfinite(lb.pack_(trained)(TOKENS, labels=TOKENS).loss)


def test_state_dict_keeps_latents_so_that_training_goes_on(trained, tiny_llama, tmp_path):
    """Saved after two steps and loaded into another copy, the third step is the same to the bit."""

    def steps(model, optimiser, count):
        for _ in range(count):
            optimiser.zero_grad()
            model(TOKENS, labels=TOKENS).loss.backward()
            optimiser.step()

    optimiser = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    steps(trained, optimiser, 2)
    torch.save({"model": trained.state_dict(), "optimiser": optimiser.state_dict()}, tmp_path / "state.pt")
    other = lb.load_model(tiny_llama)
    lb.quantize_(other, lb.Config(bits=2.5, seed=5, init="itq"), progress=False)
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(kept["model"])
    again = torch.optim.AdamW(other.parameters(), lr=1e-2)
    again.load_state_dict(kept["optimiser"])
    steps(trained, optimiser, 1)
    steps(other, again, 1)
    for mine, theirs in zip(trained.state_dict().values(), other.state_dict().values(), strict=True):
        assert_same(mine, theirs)


def test_state_dict_of_a_packed_model_goes_both_ways(trained, tmp_path):
    path = lb.save(trained, tmp_path / "out")
    model, other = lb.load(path), lb.load(path)
    for buffer in other.buffers():
        if not buffer.is_floating_point():
            buffer.zero_()
    with torch.no_grad():
        assert not torch.equal(model(TOKENS).logits, other(TOKENS).logits)
        other.load_state_dict(model.state_dict())
        assert_same(other(TOKENS).logits, model(TOKENS).logits)


def test_state_dict_of_the_other_form_is_refused(trained):
    latents = trained.state_dict()
    with pytest.raises(RuntimeError, match="u_words"):
        lb.pack_(trained).load_state_dict(latents)


FSDP = """
import sys, torch, torch.distributed as dist
import littlebit.fast as lb
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
tokens = (torch.arange(24)[None] * 5) % 256
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)

def model():
    made = lb.load_model(sys.argv[1])
    lb.quantize_(made, lb.Config(bits=2.5), progress=False)
    return made

def step(model):
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
    model(tokens, labels=tokens).loss.backward()
    optimiser.step()

plain, sharded = model(), model()
for block in sharded.model.layers:
    fully_shard(block)
fully_shard(sharded)
step(plain)
step(sharded)
whole = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
expected = plain.state_dict()
assert whole.keys() == expected.keys()
assert all(torch.equal(whole[name], expected[name]) for name in expected)
with torch.no_grad():
    packed = lb.pack_(plain)
    logits = packed(tokens).logits
    for block in packed.model.layers:
        fully_shard(block)
    fully_shard(packed)
    assert torch.equal(packed(tokens).logits, logits)
dist.destroy_process_group()
"""


def test_fsdp_wraps_training_and_packed_models_in_a_fresh_process(tiny_llama, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", FSDP, str(tiny_llama), str(tmp_path / "rendezvous")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", [LittleBitLinear, PackedLinear])
def test_copies_compute_the_same_and_share_what_they_should(kind, copied):
    original = layer() if kind is LittleBitLinear else layer().pack()
    other = copied(original)
    x = torch.randn(3, 50)
    assert type(other) is kind
    with torch.no_grad():
        assert_same(other(x), original(x))
        next(iter(other.state_dict().values())).neg_()
        assert torch.equal(other(x), original(x)) == (copied is copy.copy)
    both = torch.nn.ModuleList([original, original])
    one, two = copy.deepcopy(both)
    assert one is two


@pytest.mark.parametrize("save", [pickle.dumps, lambda each: torch.save(each, "/dev/null")])
def test_pickling_is_refused_and_says_what_to_do(save, trained):
    packed = lb.pack_(copy.deepcopy(trained))
    for each in (trained, packed, layer(), layer().pack()):
        with pytest.raises(TypeError, match=r"not pickled, .* littlebit\.fast\.save or save_pretrained"):
            save(each)


def test_tied_tables_are_copied_once(tmp_path):
    model = lb.load_model(make_tiny_llama(tmp_path / "model"))
    lb.quantize_(model, lb.Config(bits=2.5), progress=False)
    quantize_embeddings_(model, 8)
    other = copy.deepcopy(lb.pack_(model))
    assert other.lm_head.table is other.model.embed_tokens.table
    assert other.lm_head.table is not model.lm_head.table
