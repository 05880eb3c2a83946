"""The choice of an engine: the preferred one that both the bundle and this machine have."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
from softmax_regression import make_bundle

from device_runtime.engines.registry import ENGINES, EngineSource, open_engine
from fedpara_edge.errors import InputError


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """Four engines, `absent` and `rare` not installed, and a function that opens a bundle with the files of some."""
    for name in ("fast", "slow"):
        module = ModuleType(f"engine_{name}")
        module.open_engine = lambda bundle, *, threads, name=name: (name, bundle, threads)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("absent", "rare"):
        monkeypatch.setitem(sys.modules, f"onnxruntime_{name}", None)
    monkeypatch.setattr(
        "device_runtime.engines.registry.ENGINES",
        {
            "absent": EngineSource("onnxruntime_absent", "absent==1"),
            "fast": EngineSource("engine_fast", "fast==2"),
            "slow": EngineSource("engine_slow", "slow==3"),
            "rare": EngineSource("onnxruntime_rare", "rare==4"),
        },
    )
    bundle = make_bundle(tmp_path / "bundle")

    def open_with(*engines, name="auto", threads=None):
        there = replace(bundle, manifest=replace(bundle.manifest, engines=engines))
        return open_engine(there, name, threads=threads)[0::2]

    return open_with


def test_auto_takes_the_preferred_of_those_that_can_run(opened):
    assert opened("slow", "fast", "absent", threads=2) == ("fast", 2)
    assert opened("slow") == ("slow", None)
    assert opened("unheard-of", "slow") == ("slow", None)


def test_a_name_is_taken_at_its_word(opened):
    assert opened("slow", "fast", name="slow") == ("slow", None)
    words = "expected the files of engine slow, found those of fast; export the bundle again with --engine slow$"
    with pytest.raises(InputError, match=words):
        opened("fast", name="slow")
    with pytest.raises(InputError, match="engine: expected auto or one of absent, fast, slow, rare, found 'warp'"):
        opened("fast", name="warp")


def test_what_is_not_installed_comes_with_its_install_line(opened):
    with pytest.raises(
        InputError, match=r"engine 'absent': expected absent==1, found none .*; pip install 'absent==1'$"
    ):
        opened("absent")
    with pytest.raises(InputError, match="pip install 'absent==1'"):
        opened("absent", "fast", name="absent")


def test_a_bundle_of_an_engine_that_is_not_here_can_be_exported_for_the_preferred(opened):
    words = r"expected rare==4, found none .*; export the bundle again with --engine absent, or pip install 'rare==4'$"
    with pytest.raises(InputError, match=words):
        opened("rare")
    with pytest.raises(InputError, match=r"expected rare==4, found none \(.*\); pip install 'rare==4'$"):
        opened("rare", name="rare")


def test_no_engine_and_no_threads_are_refused(opened):
    with pytest.raises(InputError, match=r"slow or rare, found those of none; export .* --engine absent$"):
        opened()
    with pytest.raises(InputError, match="threads: expected an integer from 1 to 1024, found 0"):
        opened("fast", threads=0)


def test_errors_that_are_not_about_onnxruntime_are_not_dressed_up(opened, monkeypatch):
    monkeypatch.setitem(sys.modules, "engine_fast", None)
    with pytest.raises(ImportError):
        opened("fast")


def test_every_engine_has_its_module_here():
    assert all(source.module.startswith("device_runtime.") for source in ENGINES.values())
