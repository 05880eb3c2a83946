"""Transfer: weights of a model that was trained elsewhere, wrapped or saved otherwise, with a head that is new here."""

import argparse
import copy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Command
from safetensors.torch import save_file
from torch import Tensor, nn

from fedpara_edge.errors import InputError
from fedpara_edge.factors.factorization import Factorization
from fedpara_edge.formats.recipe import Recipe
from fedpara_edge.nn import convert, load_pretrained, mlp
from fedpara_edge.nn.names import Prefixes, match_names


def net(classes: int = 3) -> nn.Sequential:
    body = nn.Sequential(nn.Linear(40, 60), nn.BatchNorm1d(60))
    return nn.Sequential(body, nn.ReLU(), nn.Linear(60, classes))


def trained(classes: int = 3) -> dict[str, Tensor]:
    """A state dict in which nothing is as it was initialized."""
    torch.manual_seed(1)
    return {
        name: torch.randn(t.shape) if t.is_floating_point() else t + 7 for name, t in net(classes).state_dict().items()
    }


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def assert_loaded(model: nn.Module, state: dict[str, Tensor], *, but: str = "nothing") -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]) != name.startswith(but), name


class Hyperparameters(dict[str, Any]):
    """As Lightning's AttributeDict, of a package that is not installed where the weights are read."""


def lightning(state: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": prefixed("model.", state) | {"loss.weight": torch.ones(3)},
        "loops": {"fit_loop": {"state_dict": {}}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "hparams_name": "kwargs",
        "hyper_parameters": Hyperparameters(lr=0.1, options=argparse.Namespace(width=60), folder=Path("data")),
        "best": torch.ones(1).numpy()[0],
    }


def wrapped(state: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "plain": state,
        "parallel": prefixed("module.", state),
        "compiled": prefixed("_orig_mod.", state),
        "compiled, then parallel": prefixed("module._orig_mod.", state),
        "a compiled part": {name.replace("0.", "0._orig_mod.", 1): tensor for name, tensor in state.items()},
        "an attribute": prefixed("classifier.net.", state),
        "state_dict": {"epoch": 2, "state_dict": state},
        "model": {"model": state, "optimizer": {"state": {}, "param_groups": []}},
        "model_state_dict": {"model_state_dict": prefixed("module.", state), "args": argparse.Namespace(lr=0.1)},
        "nested": {"model": {"state_dict": state}},
        "lightning": lightning(state),
    }


@pytest.mark.parametrize("name", wrapped({}))
def test_wrapped_weights_are_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, target = trained(), net()
    absent = types.ModuleType("package_of_the_trainer")
    monkeypatch.setitem(sys.modules, absent.__name__, absent)
    monkeypatch.setattr(Hyperparameters, "__module__", absent.__name__)
    absent.Hyperparameters = Hyperparameters  # type: ignore[attr-defined]
    path = save(wrapped(state)[name], tmp_path / "weights.ckpt")
    monkeypatch.delitem(sys.modules, absent.__name__)
    found = load_pretrained(target, path)
    assert_loaded(target, state)
    assert found.loaded == tuple(state)
    assert found.new == ()
    assert found.unused == (("loss.weight",) if name == "lightning" else ())


def test_the_model_may_be_the_wrapper(tmp_path: Path) -> None:
    state, target = trained(), nn.ModuleDict({"backbone": net(), "extra": nn.Linear(3, 2)})
    path = save(state, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"'extra.bias': expected shape \(2,\), found no such tensor among 0.0"):
        load_pretrained(target, path)
    found = load_pretrained(target, path, new_head=["extra"])
    assert_loaded(target["backbone"], state)
    assert found.new == ("extra.weight", "extra.bias")
    assert found.prefixes == Prefixes(model="backbone.")
    assert "under the prefix 'backbone.' of the model's names" in str(found)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in trained().items()}
    path, target = tmp_path / f"weights.{suffix}", net()
    (save_file if suffix == "safetensors" else torch.save)(state, path)
    load_pretrained(target, path)
    assert_loaded(target, {name: t.float() if t.is_floating_point() else t for name, t in state.items()})


def test_a_head_for_other_classes_is_new(tmp_path: Path) -> None:
    path, target = save(trained(classes=10), tmp_path / "weights.pt"), net(classes=4)
    before = copy.deepcopy(target)
    with pytest.raises(
        InputError,
        match=r"tensor '2.bias': expected shape \(4,\), found shape \(10,\) \(and 1 more: 2.weight\); .*"
        r"--new-head '2'",
    ) as caught:
        load_pretrained(target, path)
    assert "\n" not in str(caught.value)
    assert_loaded(target, before.state_dict())
    for pattern in ("2", "2.*"):
        found = load_pretrained(target, path, new_head=[pattern])
        assert (found.new, found.unused) == (("2.weight", "2.bias"), ("2.weight", "2.bias"))
        assert_loaded(target[0], {name.removeprefix("0."): tensor for name, tensor in trained(10).items()})
        assert_loaded(target[2], before[2].state_dict())


def test_a_head_that_fits_is_new_if_asked(tmp_path: Path) -> None:
    target = net()
    load_pretrained(target, save(trained(), tmp_path / "weights.pt"), new_head=["2"])
    assert_loaded(target, trained(), but="2")


def test_what_older_files_lack_and_what_is_tied_may_be_missing(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "norm": nn.BatchNorm1d(4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    state = {name: torch.randn(t.shape) for name, t in model.state_dict().items() if t.is_floating_point()}
    del state["head.weight"]
    load_pretrained(model, save(state, tmp_path / "weights.pt"))
    assert torch.equal(model["head"].weight, state["embed.weight"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"0.0.weight": torch.full((60, 40), float("nan"))}, "'0.0.weight': expected finite .*, found NaN or Inf"),
        ({"0.0.weight": torch.ones(60, 40, dtype=torch.int8)}, "'0.0.weight': expected finite .*, found int8"),
        ({"0.0.weight": torch.ones(60, 41)}, r"'0.0.weight': expected shape \(60, 40\), found shape \(60, 41\);"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(change: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    target = net()
    before = copy.deepcopy(target)
    with pytest.raises(InputError, match=words):
        load_pretrained(target, save(trained() | change, tmp_path / "weights.pt"))
    assert_loaded(target, before.state_dict())


def test_patterns_of_a_new_head_match_something(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="new_head: expected patterns of tensors or modules of the model, found 'head'"
    ):
        load_pretrained(net(), save(trained(), tmp_path / "weights.pt"), new_head=["head"])
    with pytest.raises(InputError, match="new_head: expected with pretrained, found without"):
        Recipe(name="mlp", new_head=("head",))


class Runs:
    """Code that would run where a file is unpickled as it stands."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize("where", ["beside", "instead"])
def test_no_code_of_a_checkpoint_runs(where: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    code = Runs(eval, f"open({str(mark)!r}, 'w')")
    path = save({"state_dict": trained(), "callbacks": code} if where == "beside" else code, tmp_path / "weights.pt")
    if where == "beside":
        load_pretrained(net(), path)
    else:
        with pytest.raises(InputError, match="expected a state_dict, found"):
            load_pretrained(net(), path)
    assert not mark.exists()


def test_a_whole_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a state_dict.*save model.state_dict\(\)"):
        load_pretrained(net(), save(net(), tmp_path / "model.pt"))


@pytest.mark.parametrize(
    ("found", "wanted", "pairs", "prefixes"),
    [
        (["a.w", "b.w"], ["a.w", "b.w"], {"a.w": "a.w", "b.w": "b.w"}, Prefixes()),
        (["a.w"], ["b.w"], {}, Prefixes()),
        (["m.a.w", "a.w"], ["a.w"], {"a.w": "a.w"}, Prefixes()),
        (["m.a.w", "m.b.w", "a.w"], ["a.w", "b.w"], {"a.w": "m.a.w", "b.w": "m.b.w"}, Prefixes(file="m.")),
        (["module.w", "w"], ["module.w", "w"], {"module.w": "module.w", "w": "w"}, Prefixes()),
        (["w"], ["x.w", "y.w"], {"x.w": "w"}, Prefixes(model="x.")),
    ],
)
def test_names(found: list[str], wanted: list[str], pairs: dict[str, str], prefixes: Prefixes) -> None:
    assert match_names(found, wanted) == (pairs, prefixes)


def test_a_new_layer_is_drawn_and_not_fitted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    converted, report = convert(model, Factorization(gamma=0.5), pretrained=True, new=["2.weight", "2.bias"])
    assert [layer.relative_error is None for layer in report.layers] == [False, True]
    assert converted[2].compose().std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)
    assert torch.equal(converted[0].bias, model[0].bias)


@pytest.mark.slow
def test_export_with_a_new_head(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save({"state_dict": prefixed("module.", mlp(kind="dense").state_dict())}, tmp_path / "dense.pt")
    options = (
        "export",
        "mlp",
        "-o",
        "bundle",
        "--engines",
        "onnxruntime",
        "--classes",
        "4",
        "--pretrained",
        "dense.pt",
    )
    refused = run(*options)
    assert refused.code == 2
    assert "--new-head 'head'" in refused.err
    found = run(*options, "--new-head", "head", "--json").json
    assert found["pretrained"] == {
        "loaded": ["hidden.weight", "hidden.bias"],
        "new": ["head.weight", "head.bias"],
        "unused": ["module.head.weight", "module.head.bias"],
        "prefixes": ["", ""],
    }
    fitted = {layer["name"]: layer["relative_error"] for layer in found["layers"]}
    assert fitted["hidden"] > 0
    assert fitted["head"] is None
    text = run(*options, "--new-head", "head", "--overwrite").out
    assert text.startswith(
        "pretrained: 2 tensors loaded\n"
        "pretrained: new, as initialized: head.weight, head.bias\n"
        "pretrained: in the file but not in use: module.head.weight, module.head.bias\n"
    )
