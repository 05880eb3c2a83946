"""Pictures, movement and text that a phone collects become what Python would make of them; all texts are translated."""

import json
import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phone_tools import PHONE, WEB, node
from PIL import Image
from source_tree import ROOT

from device_runtime.sources.images import read_images

LENGTH, HERTZ, GRAVITY = 20, 50, 9.80665
MOTION = {"kind": "motion", "steps": 25, "channels": 6, "stepsFirst": True, "classes": ["rest", "walk"]}
SHAPES = (
    ((40, 30), (1, 28, 28)),
    ((17, 61), (3, 32, 32)),
    ((96, 128), (3, 24, 32)),
    ((28, 28), (1, 28, 28)),
    ((5, 4), (3, 9, 7)),
)
"""Sizes of pictures, and the shapes that models want of them."""


def manifest(input_shape: list[int], dtype: str, *, tokens: int | None = None, **of_label: Any) -> dict[str, Any]:
    return {
        "input": {"name": "x", "shape": input_shape, "dtype": dtype, "classes": tokens},
        "label": {"name": "y", "shape": [], "dtype": "int64", "classes": 5, **of_label},
        "output": {},
        "loss": "cross_entropy",
    }


SOURCES = {
    "gray": (manifest([1, 28, 28], "uint8"), "images"),
    "flat": (manifest([28, 28], "uint8"), "images"),
    "color": (manifest([3, 96, 64], "uint8", class_names=["ant", "bee", "cow", "dog", "elk"]), "images"),
    "steps first": (manifest([100, 6], "float32"), "motion"),
    "channels first": (manifest([3, 128], "float32"), "motion"),
    "every character": (manifest([80], "int64", tokens=80, shape=[80], classes=80), "text"),
    "last character": (manifest([80], "uint8", tokens=80, classes=80), "text"),
    "transparent": (manifest([4, 8, 8], "uint8"), "files"),
    "floats": (manifest([1, 28, 28], "float32"), "files"),
    "other tokens": (manifest([80], "int64", tokens=90, classes=90), "files"),
    "numbers": (manifest([1, 28, 28], "uint8", classes=None), "files"),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures as lossless files, some gray and some in colors."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = []
    for number, (size, _) in enumerate(SHAPES):
        paths.append(folder / f"{number}.png")
        Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def shakespeare() -> dict[str, Any]:
    """What the script that cuts Shakespeare's roles defines."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(ROOT / "plans" / "data")
        return runpy.run_path(str(ROOT / "plans" / "data" / "shakespeare.py"))


@pytest.fixture(scope="module")
def said() -> str:
    return "To be, or not to be: that is the question.\nWhether 'tis nobler – äh – in the mind\r\nto suffer"


def swing(ms: float) -> tuple[float, ...]:
    """Movement that is linear in time, as interpolation keeps it."""
    return tuple(0.001 * ms * (axis + 1) for axis in range(6))


def event(ms: float) -> list[Any]:
    x, y, z, *turns = swing(ms)
    acceleration = dict(zip("xyz", (GRAVITY * x, GRAVITY * y, GRAVITY * z), strict=True))
    return [ms, acceleration, dict(zip(("alpha", "beta", "gamma"), np.rad2deg(turns).tolist(), strict=True))]


@pytest.fixture(scope="module")
def answers(pictures: list[Path], said: str, shakespeare: dict[str, Any]) -> dict[str, Any]:
    cases: dict[str, Any] = {
        "images": [],
        "motion": [],
        "text": [],
        "sources": [given for given, _ in SOURCES.values()],
    }
    for path, (_, (channels, height, width)) in zip(pictures, SHAPES, strict=True):
        image = Image.open(path).convert("RGBA")
        picture = {"data": np.asarray(image).ravel().tolist(), "width": image.width, "height": image.height}
        cases["images"].append({"picture": picture, "shape": {"channels": channels, "height": height, "width": width}})
    uneven = np.cumsum(np.random.default_rng(1).uniform(10, 25, 100)).tolist()
    gap = [ms + (5000 if number >= 50 else 0) for number, ms in enumerate(uneven)]
    silent = [[0, {"x": None, "y": None, "z": None}, None], [20, None, None]]
    for times, source in ((uneven, MOTION), (gap, MOTION), (uneven, {**MOTION, "channels": 3, "stepsFirst": False})):
        cases["motion"].append({"given": [*silent, *map(event, times)], "source": source, "label": 1})
    alphabet = [*shakespeare["ALPHABET"]]
    for every in (True, False):
        source = {"kind": "text", "length": LENGTH, "alphabet": alphabet, "every": every}
        cases["text"].append({"said": said, "source": source})
    done = subprocess.run(
        [node(), str(PHONE / "collected.mjs")], input=json.dumps(cases), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {"cases": cases, **json.loads(done.stdout)}


def test_pictures_are_those_of_python(pictures: list[Path], answers: dict[str, Any]) -> None:
    for path, (_, shape), found in zip(pictures, SHAPES, answers["images"], strict=True):
        (expected,) = read_images((path,), size=(shape[1], shape[2]), channels=shape[0])
        differences = np.array(found).reshape(shape) - expected.astype(int)
        assert np.abs(differences).max() <= 1  # whether Pillow resizes rows or columns first depends on its release
        assert np.mean(differences != 0) < 0.3


def test_windows_of_movement_are_even_in_time_and_have_no_gap(answers: dict[str, Any]) -> None:
    for case, found in zip(answers["cases"]["motion"], answers["motion"], strict=True):
        source, times = case["source"], [ms for ms, *_ in case["given"][2:]]
        steps, channels = source["steps"], source["channels"]
        runs = np.split(times, np.flatnonzero(np.diff(times) > 200) + 1)
        counts = [int((run[-1] - run[0]) * HERTZ / 1000 + 1) // steps for run in runs]
        starts = [
            run[0] + 1000 * steps / HERTZ * k for run, count in zip(runs, counts, strict=True) for k in range(count)
        ]
        assert found["count"] == len(starts) >= 2
        assert found["y"] == [1] * len(starts)
        shape = (steps, channels) if source["stepsFirst"] else (channels, steps)
        windows = np.array(found["x"]).reshape(-1, *shape)
        for window, start in zip(windows if source["stepsFirst"] else windows.transpose(0, 2, 1), starts, strict=True):
            expected = [swing(start + 1000 / HERTZ * step)[:channels] for step in range(steps)]
            assert np.allclose(window, expected, atol=1e-9)


def test_text_is_cut_as_the_roles_of_shakespeare(
    said: str, shakespeare: dict[str, Any], answers: dict[str, Any]
) -> None:
    numbers = shakespeare["numbered"](
        said.replace("\r\n", "\n").encode("latin-1", "replace").replace(b"?", b" ")
    ).tolist()
    count = (len(numbers) - 1) // LENGTH
    following = numbers[1 : count * LENGTH + 1]
    for found, labels in zip(answers["text"], (following, following[LENGTH - 1 :: LENGTH]), strict=True):
        assert found == {"count": count, "x": numbers[: count * LENGTH], "y": labels, "unknown": 3}


def test_a_model_gets_the_sources_that_fit_it(answers: dict[str, Any]) -> None:
    found = dict(zip(SOURCES, answers["sources"], strict=True))
    assert {name: source["kind"] for name, source in found.items()} == {
        name: kind for name, (_, kind) in SOURCES.items()
    }
    assert found["color"]["classes"] == ["ant", "bee", "cow", "dog", "elk"]
    assert (found["channels first"]["steps"], found["channels first"]["channels"]) == (128, 3)
    assert [found[name]["every"] for name in ("every character", "last character")] == [True, False]


def test_every_text_is_there_in_both_languages_with_the_same_values() -> None:
    done = subprocess.run([node(), str(PHONE / "texts.mjs")], capture_output=True, text=True, check=True)
    texts = json.loads(done.stdout)
    keys = set(texts.pop("keys"))
    forms = {code: {key: values_in(text) for key, text in table.items()} for code, table in texts.items()}
    assert forms["en"] == forms["de"]
    assert forms["en"].keys() == keys
    same = {key for key in keys if texts["en"][key] == texts["de"][key]}
    assert same <= {"pause", "training", "recordedSoFar"}, "left untranslated"
    sources = "\n".join(
        path.read_text(encoding="utf-8")
        for path in WEB.rglob("*")
        if path.suffix in {".js", ".html"}
        and path.name != "texts.js"
        and not {"node_modules", "page"} & set(path.parts)
    )
    assert {key for key in keys if not re.search(rf"['\"]{key}['\"]|\b{key}:", sources)} == set(), "never said"
    asked = set(re.findall(r'data-(?:text|label)="(\w+)"', sources))
    assert asked <= keys


def values_in(text: str | dict[str, str]) -> Any:
    """Names of the values in a text, by its forms; the form for one may spell its number out."""
    if isinstance(text, str):
        return sorted(re.findall(r"\{(\w+)\}", text))
    return {form: sorted(re.findall(r"\{(\w+)\}", each)) for form, each in text.items()}
