"""The command line as a user meets it: results, JSON, and one line with an exit code for whatever goes wrong."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import Bad, Command, check_refused, succeed
from norms import norm, relative_error

from fedpara_edge.cli import COMMANDS
from fedpara_edge.demo import IMAGES
from fedpara_edge.errors import InputError
from fedpara_edge.storage import tensorfile


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle, data of three devices, test data and one update of each device."""
    folder = tmp_path_factory.mktemp("material")
    with np.load(IMAGES) as data:
        x, y, x_test, y_test = (data[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    for device in range(3):
        rows = slice(200 * device, 200 * (device + 1) - 10 * device)
        np.savez(folder / f"device-{device}.npz", x=x[rows], y=y[rows])
    np.savez(folder / "test.npz", x=x_test[:500], y=y_test[:500])
    succeed(folder, ("export", "mlp", "-o", "bundle"))
    for name in ("device-0", "device-1", "device-2"):
        update = name.replace("device", "update")
        train = ("train", "bundle", "--data", f"{name}.npz", "--client", name, "-o", f"{update}.safetensors")
        succeed(folder, train)
    return folder


@pytest.fixture
def here(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the material, as the working directory."""
    folder = tmp_path / "here"
    shutil.copytree(material, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.slow
def test_a_round(here: Path, run: Command) -> None:
    updates = [f"update-{device}.safetensors" for device in range(3)]
    weights = "bundle/weights.safetensors"
    aggregated = run("aggregate", *updates, "--weights", weights, "-o", "round-1.safetensors", "--json").json
    assert [update["client"] for update in aggregated["accepted"]] == ["device-0", "device-1", "device-2"]
    assert aggregated["rejected"] == []
    assert aggregated["round"] == 1
    assert aggregated["received_bytes"] == sum((here / update).stat().st_size for update in updates)
    assert 0 < aggregated["gap"]["relative"] < 0.2
    before, after = (
        run("evaluate", "bundle", "--weights", name, "--data", "test.npz", "--json").json
        for name in (weights, "round-1.safetensors")
    )
    assert after["examples"] == 500
    assert after["loss"] < before["loss"]
    assert after["accuracy"] > before["accuracy"] + 0.05


def test_order_of_updates_does_not_change_a_byte(here: Path, run: Command) -> None:
    for order, name in (((0, 1, 2), "a"), ((2, 0, 1), "b")):
        updates = [f"update-{device}.safetensors" for device in order]
        ended = run("aggregate", *updates, "--weights", "bundle/weights.safetensors", "-o", f"{name}.safetensors")
        assert ended.code == 0
    assert (here / "a.safetensors").read_bytes() == (here / "b.safetensors").read_bytes()


def test_training_twice_gives_the_same_bytes(here: Path, run: Command) -> None:
    again = run("train", "bundle", "--data", "device-0.npz", "--client", "device-0", "-o", "again.safetensors")
    assert again.code == 0
    assert (here / "again.safetensors").read_bytes() == (here / "update-0.safetensors").read_bytes()


def test_inspect_shows_layers_of_the_bundle(run: Command, here: Path) -> None:  # noqa: ARG001
    text = run("inspect", "bundle").out
    hidden = next(line.split() for line in text.splitlines() if line.startswith("hidden"))
    assert hidden == ["hidden", "fedpara", "256x784", "24", "256", "of", "256", "49,920", "24.9%"]
    layers = {layer["name"]: layer for layer in run("inspect", "bundle", "--json").json["layers"]}
    assert layers["hidden"]["share"] == pytest.approx(49920 / (256 * 784))


@pytest.mark.parametrize("name", ["bundle", "bundle/weights.safetensors", "update-0.safetensors", "state"])
def test_inspect_reads_every_file_of_ours(name: str, run: Command, here: Path) -> None:  # noqa: ARG001
    run("train", "bundle", "--data", "device-0.npz", "--state", "state", "-o", "more.safetensors")
    shown = run("inspect", name, "--json")
    assert shown.code == 0
    assert shown.json["path"] == name
    assert run("inspect", name).out.startswith(name)


def test_engines_train_and_evaluate_alike_clipped_and_in_parts(run: Command, here: Path) -> None:
    def change(*options: str) -> np.ndarray:
        assert run(*TRAIN, "device-0.npz", *options, "--overwrite").code == 0
        with tensorfile.TensorFile(here / "out.safetensors", format=None, error=InputError) as file:
            return np.concatenate([file.read(name).ravel() for name in file.entries])

    engines = ("onnxruntime", "ort-training")
    settings = ("--micro-batches", "2", "--clip-norm", "0.5")
    portable, ort_training = (change("--engine", engine, *settings) for engine in engines)
    assert relative_error(portable, ort_training) < 1e-3
    assert norm(portable) < 0.8 * norm(change())
    evaluation = ("evaluate", "bundle", "--data", "test.npz", "--json", "--engine")
    losses = [run(*evaluation, engine).json["loss"] for engine in engines]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(("there", "asked"), [("ort-training", "onnxruntime"), ("onnxruntime", "ort-training")])
def test_a_bundle_without_the_engine_says_how_to_export_it(
    there: str,
    asked: str,
    run: Command,
    here: Path,  # noqa: ARG001
) -> None:
    assert run("export", "mlp", "--engines", there, "-o", "one").code == 0
    assert run("inspect", "one", "--json").json["engines"] == [there]
    command = ("train", "one", "--data", "device-0.npz", "-o", "u.safetensors")
    assert run(*command, "--engine", asked).err == (
        f"Error: one: expected the files of engine {asked}, found those of {there}; "
        f"export the bundle again with --engine {asked}\n"
    )
    assert run(*command).code == 0


def test_options_over_environment_over_config_over_defaults(
    run: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps(*more: str, config: bool = True) -> int:
        front = ["--config", "config.toml"] if config else []
        options = ["--data", "device-0.npz", "-o", "u.safetensors", "--overwrite", "--json", *more]
        return int(run(*front, "train", "bundle", *options).json["steps"])

    (here / "config.toml").write_text("[train]\nbatch-size = 100\n")
    refused = run("--config", "config.toml", "train", "bundle")
    assert refused.err == (
        "Error: config.toml: train.batch-size: expected a key of this table, found an unknown one; did you mean "
        "batch_size?\n"
    )
    (here / "config.toml").write_text("[train]\nparts = 2\n")
    refused = run("--config", "config.toml", "train", "bundle")
    assert refused.err == "Error: config.toml: train.parts is now micro_batches\n"
    (here / "config.toml").write_text("[train]\nbatch_size = 100\n")
    assert steps(config=False) == 7
    assert steps() == 2
    monkeypatch.setenv("FEDPARA_EDGE_TRAIN_BATCH_SIZE", "50")
    assert steps() == 4
    assert steps("--batch-size", "25") == 8


def test_config_has_tables_for_the_commands_of_a_group(run: Command, here: Path) -> None:
    front = ("--config", "config.toml", "codec", "bench", "nowhere", "--weights", "nowhere")
    (here / "config.toml").write_text("[codec.bench]\nseconds = 99\n")
    assert "seconds: expected a number from 0 to 60, found 99.0" in run(*front).err
    (here / "config.toml").write_text("[codec.bunch]\nseconds = 9\n")
    assert run(*front).err.endswith("expected the tables bench, found 'bunch'; did you mean bench?\n")
    (here / "config.toml").unlink()
    missing = "config.toml: expected a TOML file, found No such file or directory; check the path\n"
    assert run(*front).err == f"Error: {missing}"


def test_json_and_lists_from_environment_and_config(
    run: Command,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (here / "config.toml").write_text('[export]\nexclude = ["head"]\ngamma = 0.2\nclasses = 5\n')
    monkeypatch.setenv("FEDPARA_EDGE_EXPORT_JSON", "1")
    layers = {
        layer["name"]: layer for layer in run("--config", "config.toml", "export", "mlp", "-o", "o").json["layers"]
    }
    assert (layers["head"]["reason"], layers["hidden"]["kind"]) == ("excluded", "fedpara")


def spoil_bundle(here: Path) -> None:
    model = here / "bundle" / "training_model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"?")


def save(**arrays: np.ndarray) -> Callable[[Path], None]:
    return lambda here: np.savez(here / "bad.npz", **arrays)


BRANCHING = """
from torch import nn
class Net(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else -super().forward(x)
net = lambda: Net(4, 2)
"""
X, Y = np.zeros((4, 1, 28, 28), np.uint8), np.arange(4)
TRAIN = ("train", "bundle", "-o", "out.safetensors", "--data")
AGGREGATE = ("aggregate", "--weights", "bundle/weights.safetensors", "-o", "out.safetensors")
BAD: dict[str, Bad] = {
    "no command": (None, ("tarin",), 2, "No such command"),
    "missing bundle": (None, ("train", "nowhere", "--data", "device-0.npz", "-o", "out.safetensors"), 2, "nowhere"),
    "no parts": (
        None,
        (*TRAIN, "device-0.npz", "--micro-batches", "0"),
        2,
        "--micro-batches: expected an integer from 1",
    ),
    "clip to nothing": (None, (*TRAIN, "device-0.npz", "--clip-norm", "0"), 2, "--clip-norm: expected a positive"),
    "no such engine": (
        None,
        (*TRAIN, "device-0.npz", "--engine", "warp"),
        2,
        "--engine: expected one of auto, onnxruntime",
    ),
    "missing data": (None, (*TRAIN, "nowhere.npz"), 2, "nowhere.npz"),
    "wrong names": (save(images=X, y=Y), (*TRAIN, "bad.npz"), 2, "images"),
    "wrong shape": (save(x=X[:, 0], y=Y), (*TRAIN, "bad.npz"), 2, r"bad.npz.*1, 28, 28"),
    "wrong dtype": (save(x=X.astype(np.float64), y=Y), (*TRAIN, "bad.npz"), 2, "float64"),
    "no rows": (save(x=X[:0], y=Y[:0]), (*TRAIN, "bad.npz"), 2, "bad.npz"),
    "rows differ": (save(x=X, y=Y[:2]), (*TRAIN, "bad.npz"), 2, "bad.npz"),
    "labels out of range": (save(x=X, y=Y + 8), (*TRAIN, "bad.npz"), 2, r"\b10\b"),
    "changed bundle": (spoil_bundle, (*TRAIN, "device-0.npz"), 6, "training_model.onnx"),
    "missing in bundle": (
        lambda here: (here / "bundle" / "checkpoint").unlink(),
        (*TRAIN, "device-0.npz"),
        6,
        "checkpoint",
    ),
    "bad learning rate": (None, (*TRAIN, "device-0.npz", "--lr", "-1"), 2, "--lr: expected a positive number"),
    "unknown engine": (None, (*TRAIN, "device-0.npz", "--engine", "tpu"), 2, "tpu"),
    "unknown codec": (None, (*TRAIN, "device-0.npz", "--codec", "zip"), 2, "zip"),
    "weights are an update": (None, (*TRAIN, "device-0.npz", "--weights", "update-0.safetensors"), 6, "update-0"),
    "unknown model": (None, ("export", "vgg61", "-o", "out"), 2, "vgg61"),
    "missing model file": (None, ("export", "my.py:net", "--input-shape", "4", "-o", "out"), 2, "my.py"),
    "no input shape": (
        lambda here: (here / "my.py").write_text("from torch import nn\nnet = lambda: nn.Linear(4, 2)\n"),
        ("export", "my.py:net", "-o", "out"),
        2,
        "--input-shape",
    ),
    "bad input shape": (None, ("export", "cnn", "--input-shape", "1,x", "-o", "out"), 2, "1,x"),
    "no updates": (None, AGGREGATE, 4, "update"),
    "too few updates": (None, (*AGGREGATE, "update-0.safetensors", "--min-updates", "2"), 4, "2"),
    "strict": (None, (*AGGREGATE, "update-0.safetensors", "test.npz", "--strict"), 3, "test.npz"),
    "inspect nothing": (None, ("inspect", "nowhere"), 2, "nowhere"),
    "inspect foreign": (None, ("inspect", "test.npz"), 2, "test.npz"),
    "negative seed": (None, ("export", "mlp", "--seed", "-1", "-o", "out"), 2, "--seed"),
    "no classes": (None, ("export", "mlp", "--classes", "0", "-o", "out"), 2, "--classes"),
    "weight decay": (None, ("export", "mlp", "--optimizer", "adamw", "--weight-decay", "nan", "-o", "out"), 2, "decay"),
    "weight decay of sgd": (
        None,
        ("export", "mlp", "--weight-decay", "0.1", "-o", "out"),
        2,
        "expected with optimizer adamw",
    ),
    "factory that exits": (
        lambda here: (here / "my.py").write_text("import sys\ndef net(): sys.exit(5)\n"),
        ("export", "my.py:net", "--input-shape", "4", "-o", "out"),
        2,
        "SystemExit",
    ),
    "branches on values": (
        lambda here: (here / "my.py").write_text(BRANCHING),
        ("export", "my.py:net", "--input-shape", "4", "-o", "out"),
        2,
        "torch.onnx can export",
    ),
    "pipe for data": (lambda here: os.mkfifo(here / "pipe"), (*TRAIN, "pipe"), 2, "pipe"),
    "folder for an update": (
        None,
        ("train", "bundle", "--data", "device-0.npz", "-o", "bundle", "--overwrite"),
        2,
        "a file",
    ),
    "device for an update": (None, (*TRAIN[:3], "/dev/null", "--data", "device-0.npz", "--overwrite"), 2, "/dev/null"),
    "fraction in config": (
        lambda here: (here / "c.toml").write_text("[train]\nepochs = 2.5\n"),
        ("--config", "c.toml", *TRAIN, "device-0.npz"),
        2,
        "2.5",
    ),
    "list in config": (
        lambda here: (here / "c.toml").write_text("[train]\nepochs = [1, 2]\n"),
        ("--config", "c.toml", *TRAIN, "device-0.npz"),
        2,
        "epochs",
    ),
    "unknown in config": (
        lambda here: (here / "c.toml").write_text("[train]\nsped = 1\n"),
        ("--config", "c.toml", *TRAIN, "device-0.npz"),
        2,
        "sped",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_a_code_and_writes_nothing(name: str, run: Command, here: Path) -> None:
    check_refused(run, here, BAD[name])


def test_a_bad_update_is_named_and_does_not_stop_the_others(run: Command, here: Path) -> None:
    update = (here / "update-1.safetensors").read_bytes()
    (here / "update-1.safetensors").write_bytes(update[: len(update) // 2])
    ended = run(*AGGREGATE, *(f"update-{device}.safetensors" for device in range(3)), "--json")
    assert ended.code == 0
    assert ended.err.startswith("rejected [truncated] update-1.safetensors: ")
    assert ended.json["rejected_bytes"] == len(update) // 2
    assert ended.json["received_bytes"] == sum((here / f"update-{n}.safetensors").stat().st_size for n in (0, 2))
    assert [update["client"] for update in ended.json["accepted"]] == ["device-0", "device-2"]


def test_existing_output_is_kept_unless_overwritten(run: Command, here: Path) -> None:
    (here / "out.safetensors").write_text("mine")
    ended = run(*TRAIN, "device-0.npz")
    assert ended.code == 7
    assert "--overwrite" in ended.err
    assert (here / "out.safetensors").read_text() == "mine"
    assert run(*TRAIN, "device-0.npz", "--overwrite").code == 0
    assert (here / "out.safetensors").read_bytes() != b"mine"


def test_full_disk_is_one_line_and_leaves_nothing(run: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensorfile, "save_file", full)
    before = sorted(here.iterdir())
    ended = run(*AGGREGATE, "update-0.safetensors")
    assert ended.code == 1
    assert "No space left on device" in ended.err
    assert len(ended.err.splitlines()) == 1
    assert sorted(here.iterdir()) == before


@pytest.mark.slow
def test_interrupted_training_resumes_to_the_same_bytes(run: Command, here: Path) -> None:
    train = ("train", "bundle", "--data", "device-0.npz", "--client", "c", "--epochs", "50", "--batch-size", "10")
    assert run(*train, "-o", "whole.safetensors").code == 0
    resumable = (*train, "--state", "state", "--save-steps", "20", "-o", "parts.safetensors", "--json")
    process = subprocess.Popen(
        [sys.executable, "-m", "fedpara_edge", *resumable],
        cwd=here,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not (here / "state" / "progress.safetensors").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err.strip()) == (130, "", "Error: interrupted")
    assert not (here / "parts.safetensors").exists()
    assert run(*resumable).json["resumed_from_step"] > 0
    assert (here / "parts.safetensors").read_bytes() == (here / "whole.safetensors").read_bytes()


def test_own_model_from_a_file(run: Command, here: Path) -> None:
    (here / "mine.py").write_text(
        "from torch import nn\n\n\ndef net():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 3))\n"
    )
    ended = run("export", "mine.py:net", "--input-shape", "1,8,8", "--gamma", "0.2", "-o", "mine", "--json")
    assert ended.code == 0, ended.err
    kinds = {layer["name"]: layer["kind"] for layer in ended.json["layers"]}
    assert kinds == {"1": "fedpara", "3": "dense"}


def test_a_federation_may_begin_with_encoded_weights(run: Command, here: Path) -> None:  # noqa: ARG001
    options = ("--initial-codec", "int4", "--engines", "onnxruntime")
    assert run("export", "mlp", "-o", "small", *options).code == 0
    assert 5 * Path("small/weights.safetensors").stat().st_size < Path("bundle/weights.safetensors").stat().st_size
    train = ("train", "small", "--data", "device-0.npz", "--client", "a", "--state", "a", "--codec", "uniform")
    assert run(*train, "-o", "u1").code == 0
    server = ("--state", "server", "--downlink-codec", "uniform")
    weights = "small/weights.safetensors"
    assert run("aggregate", "u1", "--weights", weights, *server, "--change", "c1", "-o", "w1").code == 0
    assert run("apply", weights, "c1", "-o", "mine").code == 0
    assert Path("mine").read_bytes() == Path("w1").read_bytes()
    for path in (weights, "w1"):
        assert run("evaluate", "small", "--weights", path, "--data", "test.npz").code == 0
        assert run("fold", "small", "--weights", path, "-o", f"{Path(path).name}.onnx").code == 0
        assert "784" in run("inspect", path).out
    assert run(*train, "--weights", "w1", "-o", "u2").code == 0


def test_help_imports_neither_torch_nor_onnxruntime() -> None:
    code = (
        "import sys\nfrom fedpara_edge.cli import fedpara_edge\n"
        "fedpara_edge.main(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy'} & sys.modules.keys()\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


def test_personal_tensors_stay_on_the_device(run: Command, here: Path) -> None:
    assert run("export", "mlp", "--kind", "pfedpara", "--gamma", "0.5", "-o", "personal").code == 0
    command = ("train", "personal", "--data", "device-0.npz", "-o", "p.safetensors", "--lr", "0.1", "--json")
    ended = run(*command)
    assert ended.code == 2
    assert "--state" in ended.err
    assert run(*command, "--state", "state").code == 0
    names = run("inspect", "p.safetensors", "--json").json["tensors"].keys()
    assert {"hidden.x1", "hidden.y1", "hidden.bias"} <= names
    assert not {name for name in names if name.endswith(("x2", "y2"))}
    kept = (here / "state" / "lasting.safetensors").read_bytes()
    update = (here / "p.safetensors").read_bytes()
    with np.load(here / "device-0.npz") as data:
        assert data["x"][0].tobytes() not in update
    assert b"hidden.x2" in kept
    assert b"hidden.x2" not in update
    aggregated = ("aggregate", "p.safetensors", "--weights", "personal/weights.safetensors", "-o", "next.safetensors")
    assert run(*aggregated).code == 0
    evaluation = ("evaluate", "personal", "--weights", "next.safetensors", "--data", "device-0.npz", "--json")
    without, with_state = run(*evaluation).json, run(*evaluation, "--state", "state").json
    assert with_state["loss"] != without["loss"]
