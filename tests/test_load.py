"""References to models: the zoo, modules and files; every failure says at which step it happened."""

import sys
from pathlib import Path

import pytest

from fedpara_edge.errors import InputError
from fedpara_edge.nn import ZOO, FactoredLayer, load_model

CODE = """
from torch import nn
import sibling

class Tiny(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(sibling.INPUTS, width)

def make():
    import late
    return nn.Sequential(Tiny(late.WIDTH))

def needs(classes): ...
def number(): return 3
def broken(): raise ValueError("two\\nlines")
model = Tiny()
constant = 7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a user's code; modules imported from it are forgotten afterwards."""
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("")
    for place in (tmp_path / "pack" / "net.py", tmp_path / "net.py"):
        place.write_text(CODE)
    (tmp_path / "sibling.py").write_text("INPUTS = 3")
    (tmp_path / "late.py").write_text("WIDTH = 5")
    (tmp_path / "faulty.py").write_text("import sibling\nsibling.missing")
    (tmp_path / "needy.py").write_text("import not_installed_anywhere")
    (tmp_path / "typo.py").write_text("def make(:\n")
    monkeypatch.chdir(tmp_path)
    before = dict(sys.modules)
    path = list(sys.path)
    yield tmp_path
    assert sys.path == path
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] in ("pack", "net", "sibling", "late", "faulty", "needy", "typo"):
            del sys.modules[name]


@pytest.mark.parametrize("name", ZOO)
def test_zoo_models_are_dense(name: str) -> None:
    model = load_model(name)
    assert not any(isinstance(module, FactoredLayer) for module in model.modules())
    entry = ZOO[name]
    other = load_model(name, classes=3, input_shape=(2, 32, 32) if len(entry.input_shape) == 3 else entry.input_shape)
    (*_, (last, bias)) = other.state_dict().items()
    assert last.endswith(("head.bias", "classifier.1.bias", "classifier.3.bias"))
    assert bias.shape == (3,)


@pytest.mark.parametrize(
    "reference", ["net.py:make", "pack/net.py:make", "./net.py:make", "net:make", "pack.net:make", "net.py:Tiny"]
)
def test_user_code(folder: Path, reference: str) -> None:
    if reference == "pack/net.py:make":  # a file finds its neighbours, wherever it is run from
        for name in ("sibling.py", "late.py"):
            (folder / name).rename(folder / "pack" / name)
    names = [name for name, _ in load_model(reference).named_parameters()]
    assert [name.removeprefix("0.") for name in names] == ["layer.weight", "layer.bias"]


def test_absolute_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert load_model(f"{folder / 'net.py'}:make") is not None


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("cmm", r"model 'cmm': expected mlp, cnn, .*, module:factory or file.py:factory"),
        ("net.py", r"model 'net.py': expected .* file.py:factory"),
        ("net.py:", r"model 'net.py:': expected .* file.py:factory"),
        (":make", r"model ':make': expected .* file.py:factory"),
        ("C:\\net.py", r"expected .* file.py:factory"),
        ("absent.py:make", r"model file 'absent.py': no such file \(working directory '.+'\)"),
        ("absent:make", r"model module 'absent': not found in the working directory .*; a file needs its .py"),
        ("pack.absent:make", r"model module 'pack.absent': not found"),
        ("pack.net.deeper:make", r"model module 'pack.net.deeper': not found"),
        ("net.py:mkae", r"model 'net.py:mkae': expected a factory 'mkae', found Tiny, make, needs, number, broken"),
        (
            "net:constant",
            r"model 'net:constant': expected a function that makes the model, found an object of type int",
        ),
        ("net:model", r"expected a function that makes the model, found an object of type Tiny"),
        ("net:needs", r"expected a factory that needs no arguments: missing a required argument: 'classes'"),
        ("net:number", r"model 'net:number': expected its factory to return an nn.Module, found int"),
        ("net:broken", r"model 'net:broken': ValueError: two lines$"),
        ("faulty.py:make", r"model file 'faulty.py': AttributeError: module 'sibling' has no attribute 'missing'"),
        ("needy:make", r"model module 'needy': ModuleNotFoundError: No module named 'not_installed_anywhere'"),
        ("typo.py:make", r"model file 'typo.py': SyntaxError: invalid syntax"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_failures_say_where(reference: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_model(reference)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("folder")
def test_the_users_exception_is_the_cause() -> None:
    with pytest.raises(InputError) as caught:
        load_model("net:broken")
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.usefixtures("folder")
def test_zoo_options_are_for_the_zoo() -> None:
    with pytest.raises(InputError, match="classes and input shape are options of the zoo; set them in 'make'"):
        load_model("net:make", classes=3)
