"""Run the public laws of littlebit.conformance over both packages."""

import pytest
import torch
from hypothesis import settings
from littlebit.conformance import LAWS, Backend, broken, check
from littlebit.conformance.examples import numpy_kernel, torch_fast

SHARE = 8  # a law gets this part of the profile's examples: most have sisters that draw the same inputs


def reference():
    """The reference with the kit's reader of checkpoints, in two dtypes."""
    module = broken.correct()
    module.DTYPES = ("float32", "float64")
    return Backend(module)


BACKENDS = {
    "reference": reference(),
    "fast": Backend(torch_fast, "cpu"),
    "numpy_kernel": Backend(numpy_kernel),
}
CASES = [
    pytest.param(backend, law, id=f"{name}-{law.name}")
    for name, backend in BACKENDS.items()
    for law in LAWS
    if not backend.missing(law.functions)
]


@pytest.mark.parametrize(("backend", "law"), CASES)
def test_law_holds(backend, law):
    outcome = check(law, backend, max(20, settings().max_examples // SHARE))
    assert outcome is None, str(outcome)


@pytest.mark.parametrize("library", ["triton", "jax"])
def test_example_in_another_library_holds_all_its_laws(library):
    pytest.importorskip(library)
    if library == "triton" and not torch.cuda.is_available():
        pytest.skip("Triton needs a GPU")
    backend = Backend(f"littlebit.conformance.examples.{library}_kernel")
    for law in LAWS:
        if not backend.missing(law.functions):
            outcome = check(law, backend)
            assert outcome is None, str(outcome)


def test_both_packages_offer_every_function():
    for name in ("reference", "fast"):
        assert not BACKENDS[name].missing([function for law in LAWS for function in law.functions])
