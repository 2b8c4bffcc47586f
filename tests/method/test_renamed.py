"""Old public names: they give what the new ones give, and warn with the new name."""

import littlebit.fast as lb
import littlebit.reference as ref
import numpy as np
import pytest
import torch
from littlebit.fast.cli.main import build_parser
from littlebit.fast.decoding import generate
from littlebit.reference._renamed import NAMES, VALUES, renamed_keywords

PACKAGES = {"reference": ref, "fast": lb}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("old", NAMES)
def test_an_old_name_is_the_new_one(package, old):
    loaded, new = PACKAGES[package], NAMES[old]
    if not hasattr(loaded, new):
        pytest.skip(f"{new} is not in {package}")
    for _ in range(2):  # the name is not kept, so each use warns
        with pytest.warns(DeprecationWarning, match=rf"{package}\.{old} is now littlebit\.{package}\.{new}; the next"):
            assert getattr(loaded, old) is getattr(loaded, new)
    assert old not in dir(loaded)
    assert old not in getattr(loaded, "__all__", ())


def test_every_new_name_is_exported():
    assert all(hasattr(lb, new) for new in NAMES.values())
    assert not set(NAMES) & (set(NAMES.values()) | set(dir(lb)) | set(dir(ref)))


def test_an_old_name_warns_where_it_is_used():
    with pytest.warns(DeprecationWarning, match="rotate is now") as caught:
        from littlebit.fast import rotate
    assert rotate is lb.apply_rope
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize("loaded", PACKAGES.values(), ids=PACKAGES)
def test_a_name_that_never_was_is_an_attribute_error(loaded):
    with pytest.raises(AttributeError, match=rf"module '{loaded.__name__}' has no attribute 'no_such_name'"):
        _ = loaded.no_such_name


@pytest.mark.parametrize(("loaded", "array"), [(ref, np.asarray), (lb, torch.as_tensor)], ids=PACKAGES)
def test_old_keywords_do_what_the_new_ones_do(loaded, array):
    student, teacher = array([[3.0, 1.0], [0.5, 2.0]]), array([[1.0, 1.0], [10.0, 20.0]])
    for function in (loaded.hidden_loss, loaded.hidden_loss_vjp):
        with pytest.warns(DeprecationWarning, match=r"hidden_loss\w*\(normalise=...\) is now \w+\(normalize=...\)"):
            old = function(student, teacher, normalise=True)
        assert (old == function(student, teacher, normalize=True)).all()
        assert not (old == function(student, teacher)).all()
    one, factorize = array([1.0, 1.0]), lambda matrix, rank: loaded.dual_svid(2 * matrix, rank)
    for function, more in ((loaded.compensate, ()), (loaded.compensate_weighted, (one, one))):
        with pytest.warns(DeprecationWarning, match=r"\(factorise=...\) is now \w+\(factorize=...\)") as caught:
            (old,) = function(student, [1], *more, factorise=factorize)
        assert caught[0].filename == __file__
        (new,) = function(student, [1], *more, factorize=factorize)
        assert all((a == b).all() for a, b in zip(old, new, strict=True))


def test_both_names_of_a_keyword_are_an_error():
    with pytest.raises(TypeError, match="takes 'normalize', once called 'normalise', and got both; give 'normalize'"):
        ref.hidden_loss(np.ones((1, 1)), np.ones((1, 1)), normalize=True, normalise=False)
    with pytest.warns(DeprecationWarning, match="normalise"), pytest.raises(TypeError, match="multiple values"):
        ref.hidden_loss(np.ones((1, 1)), np.ones((1, 1)), True, normalise=False)


def test_renamed_keywords_decorates_classes():
    @renamed_keywords(colour="color")
    class Pen:
        def __init__(self, color):
            self.color = color

    with pytest.warns(DeprecationWarning, match=r"Pen\(colour=...\) is now Pen\(color=...\)"):
        assert Pen(colour="red").color == Pen(color="red").color == "red"
    assert isinstance(Pen, type)


def test_the_full_cache_keeps_its_old_name():
    assert VALUES["kv_cache", "ordinary"] == "full"
    shape = ref.MODEL_SHAPES["smollm2-135m"]
    with pytest.warns(DeprecationWarning, match="kv_cache='ordinary' is now kv_cache='full'") as caught:
        old = ref.model_memory(shape, context=10, kv_cache="ordinary")
    assert caught[0].filename == __file__
    assert old == ref.model_memory(shape, context=10, kv_cache="full")
    with pytest.warns(DeprecationWarning, match="is now kv_cache='full'"):
        arguments = build_parser().parse_args(["memory", "--kv-cache", "ordinary"])
    assert arguments.kv_cache == "full"


def test_generate_and_stream_take_the_old_name_of_the_full_cache(monkeypatch):
    seen = []
    for name, stub in {
        "prompt_tokens": lambda *_: [1],
        "pad_token": lambda _: None,
        "text_chunks": lambda *_: iter(("text",)),
        "stream_tokens": lambda model, tokens, config, pad: seen.append(config.kv_cache),
        "batch_tokens": lambda model, prompts, config, pad: seen.append(config.kv_cache) or [[2]],
    }.items():
        monkeypatch.setattr(generate, name, stub)
    for call, prompt in ((lb.generate, "a"), (lb.generate, ["a"]), (generate.stream, "a")):
        with pytest.warns(DeprecationWarning, match="is now kv_cache='full'") as caught:
            call(None, prompt, tokenizer="tokenizer", kv_cache="ordinary")
        assert caught[0].filename == __file__
        assert len(caught) == 1
    assert seen == ["full"] * 3


@pytest.mark.parametrize("wrong", ["int8", None, ["full"], 4])
def test_a_value_that_never_was_is_refused(wrong):
    with pytest.raises(ValueError, match="kv_cache must be one of full, latent, latent-int8, not"):
        ref.model_memory(ref.MODEL_SHAPES["smollm2-135m"], kv_cache=wrong)


def test_compiled_losses_take_their_keywords():
    student, teacher = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    compiled = torch.compile(lb.hidden_loss, backend="eager", fullgraph=True)
    assert compiled(student, teacher, True) == lb.hidden_loss(student, teacher, True)
