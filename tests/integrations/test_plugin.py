"""Test the post-import hook with made-up libraries, whatever else uses the import system."""

import copy
import importlib.util
import sys
import threading
import types

import pytest
from littlebit.fast.integrations import plugin

LIBRARY, LISTS = "made_up_library", "made_up_library.lists"


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Install a new hook and a library with a list to register in; return the record of calls to `register`."""
    folder = tmp_path / LIBRARY
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "lists.py").write_text("KNOWN = []\n")
    (tmp_path / "another_library.py").write_text("")
    found: list[str] = []
    ours = types.ModuleType("littlebit.fast.made_up")

    def register():
        sys.modules[LISTS].KNOWN.append("littlebit")
        found.append("registered")

    ours.register = register
    monkeypatch.setitem(sys.modules, ours.__name__, ours)
    monkeypatch.setattr(plugin, "REGISTRARS", {LISTS: "..made_up"})
    hook = plugin.PostImportHook()
    monkeypatch.setattr(plugin, "HOOK", hook)
    monkeypatch.setattr(
        sys, "meta_path", [each for each in sys.meta_path if not isinstance(each, plugin.PostImportHook)]
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield found
    for name in [name for name in sys.modules if name.startswith((LIBRARY, "another_library"))]:
        del sys.modules[name]


def lists():
    return importlib.import_module(LISTS)


def test_register_extends_when_the_library_is_imported(calls):
    plugin.register()
    assert calls == []
    assert lists().KNOWN == ["littlebit"]
    importlib.import_module("another_library")
    assert calls == ["registered"]


def test_register_extends_with_what_is_imported_already(calls):
    assert lists().KNOWN == []
    plugin.register()
    plugin.register()
    assert lists().KNOWN == ["littlebit"]
    assert sys.meta_path.count(plugin.HOOK) == 1


def test_asking_for_the_spec_first_changes_nothing(calls):
    plugin.register()
    for _ in range(3):
        spec = importlib.util.find_spec(LISTS)
        assert spec.origin.endswith("lists.py")
        assert spec.loader.get_source(LISTS) == "KNOWN = []\n"
    assert lists().KNOWN == ["littlebit"]


def test_the_module_keeps_its_own_loader(calls):
    plugin.register()
    loader = importlib.util.find_spec(LISTS).loader
    assert copy.copy(loader).loader is loader.loader
    module = lists()
    assert not isinstance(module.__loader__, plugin.HookedLoader)
    assert module.__spec__.loader is module.__loader__


def test_an_import_that_fails_first_is_no_obstacle(calls, tmp_path):
    plugin.register()
    (tmp_path / LIBRARY / "lists.py").write_text("raise ImportError('not yet')\n")
    with pytest.raises(ImportError, match="not yet"):
        lists()
    assert calls == []
    (tmp_path / LIBRARY / "lists.py").write_text("KNOWN = ['of another length']\n")
    importlib.invalidate_caches()
    assert lists().KNOWN == ["of another length", "littlebit"]


def test_a_reloaded_module_is_extended_again(calls):
    plugin.register()
    for _ in range(3):
        assert importlib.reload(lists()).KNOWN == ["littlebit"]


def test_a_lazy_loader_registers_at_the_first_look(calls):
    plugin.register()
    spec = importlib.util.find_spec(LISTS)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[LISTS] = module
    spec.loader.exec_module(module)
    assert calls == []
    assert module.KNOWN == ["littlebit"]


def test_a_loader_that_serves_other_modules_is_left_as_it_is(calls):
    """Pytest's assertion rewriter, for one, is finder and loader in one object."""

    class Rewriting:
        def find_spec(self, name, path=None, target=None):
            if name not in (LISTS, "another_library"):
                return None
            return importlib.util.spec_from_loader(name, self, origin="made up")

        def create_module(self, spec):
            return None

        def exec_module(self, module):
            module.KNOWN = ["rewritten"]

    rewriting = Rewriting()
    sys.meta_path.insert(0, rewriting)
    plugin.register()
    assert lists().KNOWN == ["rewritten", "littlebit"]
    assert importlib.import_module("another_library").KNOWN == ["rewritten"]
    assert vars(rewriting) == {}


@pytest.mark.parametrize("asks_others", [False, True])
def test_a_finder_that_answers_first_is_noticed(asks_others, calls):
    class First:
        def find_spec(self, name, path=None, target=None):
            if name != LISTS:
                return None
            finders = [each for each in sys.meta_path if each is not self]
            if not asks_others:
                finders.remove(plugin.HOOK)
            found = (each.find_spec(name, path, target) for each in finders)
            return next((spec for spec in found if spec is not None), None)

    plugin.register()
    sys.meta_path.insert(0, First())
    module = lists()
    importlib.import_module("another_library")
    assert module.KNOWN == ["littlebit"]
    sys.meta_path.append(sys.meta_path.pop(0))  # a finder that asks the hook again, after it
    assert importlib.util.find_spec("made_up_library.nothing") is None


def test_threads_that_import_at_once_find_it_registered(calls, tmp_path):
    (tmp_path / LIBRARY / "lists.py").write_text("import time\ntime.sleep(0.1)\nKNOWN = []\n")
    plugin.register()
    found = []
    threads = [threading.Thread(target=lambda: found.append(list(lists().KNOWN))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == 4 * [["littlebit"]]


@pytest.mark.parametrize("error", [ImportError, AttributeError, TypeError])
def test_a_library_that_does_not_fit_can_still_be_imported(error, calls, caplog, monkeypatch):
    def fail():
        raise error("no such name")

    monkeypatch.setattr(sys.modules["littlebit.fast.made_up"], "register", fail)
    plugin.register()
    assert lists().KNOWN == []
    assert f"cannot plug into this version of {LIBRARY} (no such name): pip install -U {LIBRARY}" in caplog.text


def test_transformers_and_peft_are_registered_again_after_a_reload():
    peft = pytest.importorskip("peft")
    import peft.tuners.lora.model as lora_model
    import transformers.quantizers.auto as auto
    from littlebit.fast import LittleBitConfig
    from littlebit.fast.integrations import peft_lora

    for module, holds in (
        (auto, lambda: auto.AUTO_QUANTIZATION_CONFIG_MAPPING["littlebit"] is LittleBitConfig),
        (lora_model, lambda: lora_model.dispatch_default.__module__ == peft_lora.__name__),
    ):
        assert holds()
        before = dict(vars(module))
        try:
            importlib.reload(module)
            assert holds()
        finally:
            vars(module).update(before)
    assert peft.tuners.tuners_utils._maybe_include_all_linear_layers.__module__ == peft_lora.__name__
