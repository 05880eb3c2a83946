"""Images, sounds and tables through the commands: bundles with class names, devices with some of the classes."""

import csv
import json
import wave
from pathlib import Path

import numpy as np
import pytest
from command_line import Command, succeed
from PIL import Image
from small_net import without_verification
from torch import nn

from export import export_bundle
from fedpara_edge.errors import InputError
from fedpara_edge.formats.bundle import open_bundle
from fedpara_edge.formats.recipe import ExportConfig

NAMES = ("circle", "cross", "square")


def draw(kind, generator):
    """A picture of a shape, uint8 [8, 8]."""
    away = np.abs(np.mgrid[:8, :8] - np.array(generator.integers(3, 5, 2))[:, None, None])
    shape = {"circle": np.hypot(*away).round() == 2, "cross": away.min(axis=0) == 0, "square": away.max(axis=0) == 2}
    return np.where(shape[kind], 255, generator.integers(0, 40, (8, 8))).astype(np.uint8)


def save_shapes(folder, kinds, count, seed):
    generator = np.random.default_rng(seed)
    for kind in kinds:
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(draw(kind, generator)).save(folder / kind / f"{number:02}.png")


def export(folder, *, shape, outputs, **options):
    """A bundle of a linear model."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), outputs))
    with without_verification():
        return export_bundle(model, folder, ExportConfig(input_shape=shape, engines=("onnxruntime",), **options))[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with bundles, one for shapes with class names and one for tables, and data for both."""
    folder = tmp_path_factory.mktemp("data")
    export(
        folder / "shapes.bundle",
        shape=(1, 8, 8),
        outputs=3,
        input_dtype="uint8",
        class_names=("circle,cross", "square"),
    )
    export(folder / "walks.bundle", shape=(4, 2), outputs=2)
    save_shapes(folder / "all", NAMES, 12, seed=0)
    save_shapes(folder / "some", ("square", "cross"), 12, seed=1)
    with (folder / "walks.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["person", "ax", "ay", "label"])
        for person in ("ann", "bob", "cai"):
            for kind in ("run", "walk"):
                writer.writerows([person, step % 2 + (kind == "run"), 0.5, kind] for step in range(16))
    for number, tone in enumerate((200, 900)):
        (folder / "tones" / str(tone)).mkdir(parents=True)
        with wave.open(str(folder / "tones" / str(tone) / "0.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes((np.sin(np.arange(80) * (number + 1)) * 9000).astype("<i2").tobytes())
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """The working directory with these."""
    for each in made.iterdir():
        if not each.name.startswith("."):
            (tmp_path / each.name).symlink_to(each)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_bundle_has_the_names_of_its_classes(made):
    (label,) = open_bundle(made / "shapes.bundle").interface.labels
    assert label.class_names == NAMES
    assert json.loads((made / "shapes.bundle" / "manifest.json").read_text())["schema"] == 2
    assert json.loads((made / "walks.bundle" / "manifest.json").read_text())["schema"] == 1


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("a", "b"), "class_names: expected a name for each class of the outputs .3., 3, found 2"),
        (("a,a,b",), "class_names: expected different names, none empty, found a, a, b"),
        (("a,,b",), "class_names: expected different names, none empty, found a, , b"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path, names, words):
    with pytest.raises(InputError, match=words):
        export(tmp_path / "bundle", shape=(2,), outputs=3, class_names=names)


def test_images_are_trained_evaluated_and_predicted_as_they_are(run: Command, here: Path) -> None:  # noqa: ARG001
    rate = ("--lr", "0.5", "--epochs", "30", "--seed", "1")
    trained = run("train", "shapes.bundle", "--data", "all", *rate, "-o", "u.safetensors", "--json")
    assert trained.json["examples"] == 36
    assert trained.json["losses"][-1] < trained.json["losses"][0] / 2
    run("aggregate", "u.safetensors", "--weights", "shapes.bundle/weights.safetensors", "-o", "w.safetensors")
    evaluate = ("evaluate", "shapes.bundle", "--weights", "w.safetensors", "--data")
    text = run(*evaluate, "some").out
    assert [line.split()[:3] for line in text.splitlines()[-3:]] == [
        ["0", "circle", "0"],
        ["1", "cross", "12"],
        ["2", "square", "12"],
    ]
    found = run(*evaluate, "some", "--json").json
    assert found["accuracy"] > 0.8
    assert [row["class"] for row in found["labels"]["y"]["classes"]] == [*NAMES]
    assert run("fold", "shapes.bundle", "--weights", "w.safetensors", "-o", "m.onnx").code == 0
    predicted = run("predict", "m.onnx", "--data", "some", "-o", "p.npz", "--json").json
    assert predicted["accuracy"] == found["accuracy"]
    assert predicted["labels"]["y"]["confusion"] == found["labels"]["y"]["confusion"]


def test_a_split_keeps_the_names_for_devices_that_have_some_of_the_classes(run: Command, here: Path) -> None:  # noqa: ARG001
    options = ("--split", "shards", "--clients", "3", "--shards", "1", "-o", "parts")
    assert run("split", "some", *options).code == 0
    with np.load("parts/train/client-0.npz") as arrays:
        assert arrays["y_names"].tolist() == ["cross", "square"]
    total = np.zeros(3, int)
    for part in Path("parts/train").iterdir():
        found = run("evaluate", "shapes.bundle", "--data", part, "--json").json
        total += np.sum(found["labels"]["y"]["confusion"], axis=1)
    assert total.tolist() == [0, 12, 12]


def test_a_class_that_the_bundle_lacks_is_refused(run: Command, here: Path) -> None:
    save_shapes(here / "more", ("circle",), 1, seed=0)
    (here / "more" / "circle").rename(here / "more" / "ellipse")
    ended = run("train", "shapes.bundle", "--data", "more", "-o", "u.safetensors")
    assert ended.code == 2
    assert "more: class 'ellipse': expected one of circle, cross, square, found another" in ended.err


def test_tables_are_trained_in_windows_and_dealt_by_person(run: Command, here: Path) -> None:  # noqa: ARG001
    columns = ("--column", "ax", "--column", "ay", "--window", "4", "--window-key", "person")
    trained = run(
        "train", "walks.bundle", "--data", "walks.csv", *columns, "--lr", "0.5", "-o", "u.safetensors", "--json"
    )
    assert trained.json["examples"] == 24
    assert run("split", "walks.csv", *columns, "--split", "key", "--key", "person", "-o", "people").code == 0
    assert sorted(path.stem for path in Path("people/train").iterdir()) == ["ann", "bob", "cai"]
    with np.load("people/train/bob.npz") as arrays:
        assert arrays["x"].shape == (8, 4, 2)
    assert run("evaluate", "walks.bundle", "--data", "people/train/bob.npz").code == 0


@pytest.mark.slow
def test_a_plan_takes_them_as_well(run: Command, here: Path) -> None:
    plan = here / "plan.toml"
    plan.write_text(
        'name = "walks"\nrounds = 1\nseeds = [0]\n[data]\npath = "walks.csv"\ncolumn = ["ax", "ay"]\nwindow = 4\n'
        'window_key = "person"\nsplit = "key"\nkey = "person"\ntest_share = 0.25\n'
        '[model]\nname = "walks.py:model"\ninput_shape = [4, 2]\nclass_names = ["run", "walk"]\n'
        "[train]\nlr = 0.1\n[arms.one]\n"
    )
    (here / "walks.py").write_text(
        "from torch import nn\ndef model():\n    return nn.Sequential(nn.Flatten(), nn.Linear(8, 2))\n"
    )
    ended = run("simulate", "plan.toml", "-o", "run", "--workers", "1", "--json")
    assert ended.code == 0, ended.err
    lines = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
    (done,) = [line for line in lines if line["event"] == "round"]
    assert done["accuracy"] is not None
    assert lines[0]["model"] == "walks.py:model"  # not where it was


def test_convert_tells_what_became_of_a_source(run: Command, here: Path) -> None:
    ended = run("data", "convert", "tones", "-o", "arrays")
    assert ended.out.splitlines() == [
        "arrays: 2 examples",
        "files: text [2]",
        "x: float32 [2, 1, 80], from -0.274628 to 0.274628",
        "y: int64 [2], from 0 to 1",
        "y_names: text [2]",
        "classes: 0 200, 1 900",
    ]
    found = run("data", "convert", "walks.csv", "--window", "4", "-o", "w", "--bundle", "walks.bundle", "--json").json
    assert found["arrays"]["x"] == {"shape": [24, 4, 2], "dtype": "float32"}
    assert found["classes"] == ["run", "walk"]
    assert run("data", "convert", "tones", "-o", "arrays").code == 7
    assert not list(here.glob("*.npy"))


def test_data_of_another_kind_says_what_it_expected(run: Command, here: Path) -> None:
    assert (
        "--image-size: expected for another kind of data"
        in run("data", "convert", "walks.csv", "--image-size", "3,3", "-o", "w").err
    )
    (here / "notes.txt").write_text("none")
    assert "notes.txt: expected a table" in run("data", "convert", "notes.txt", "-o", "w").err


@pytest.mark.parametrize(
    ("bundle", "data", "words"),
    [
        (
            "walks.bundle",
            ("unlabelled.csv", "--window", "4"),
            "--label-column: unlabelled.csv: expected a column with the label, found 'activity', 'ax', 'ay', 'person'; "
            "name it",
        ),
        (
            "shapes.bundle",
            ("all/circle",),
            "all/circle: expected what makes 'y', found what makes 'files', 'x'; labels are the names of folders, one "
            "for each class, and a model of several inputs takes arrays",
        ),
    ],
)
def test_a_source_without_labels_is_named_as_the_user_knows_it(
    run: Command, here: Path, bundle: str, data: tuple[str, ...], words: str
) -> None:
    table = (here / "walks.csv").read_text().replace("label", "activity")
    (here / "unlabelled.csv").write_text(table)
    ended = run("train", bundle, "--data", *data, "--lr", "0.1", "-o", "u")
    assert ended.code == 2
    assert ended.err.splitlines()[-1] == f"Error: {words}"


def test_a_zoo_model_has_as_many_outputs_as_names(tmp_path: Path) -> None:
    succeed(tmp_path, ["export", "mlp", "--class-names", "a,b,c", "--engines", "onnxruntime", "-o", "bundle"])
    assert open_bundle(tmp_path / "bundle").interface.labels[0].class_names == ("a", "b", "c")
