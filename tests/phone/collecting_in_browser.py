"""Phones collect pictures, movement and text: these go to an update that is taken, and nothing else leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import Command
from emulated_phone import SETTINGS, Phone, Told, ask, collecting, picking
from phone_site import Site
from PIL import Image

from fedpara_edge.formats.bundle import WEIGHTS, Bundle
from fedpara_edge.formats.update import open_update
from fedpara_edge.formats.weights import read_weights

CLASSES = ("boot", "sandal", "trousers")
ACTIVITIES = ("sitting", "standing", "walking", "upstairs", "downstairs")
TRAINED = (("tap", "start"), ("until", "done"), ("tap", "send"), ("untilStatus", "Sent"))
SONNET = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate:"


def check_taken(told: Told, site: Site, bundle: Bundle, folder: Path, run: Command, *, examples: int) -> None:
    """Nothing but the update left the phone, and `aggregate` takes it."""
    assert told.sent(site) == [("updates", len(site.updates[-1]))]
    path = folder / "update.safetensors"
    path.write_bytes(site.updates[-1])
    update = open_update(path, read_weights(bundle.file(WEIGHTS), bundle))
    assert update.header.examples == examples
    update.close()
    ended = run("aggregate", path, "--weights", bundle.file(WEIGHTS), "-o", folder / "round-1.safetensors")
    assert ended.code == 0, ended.err
    assert "from 1 update (" in ended.out


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Photos by class in a folder, in several sizes."""
    random = np.random.default_rng(0)
    for number, name in enumerate(("boot", "boot", "trousers")):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (40 + number, 60, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def test_pictures_of_the_camera_the_library_and_a_folder(
    page: Path, photos: Path, tmp_path: Path, run: Command
) -> None:
    """They survive a restart, and can be looked at and deleted."""
    shape = (3, 16, 24)
    with collecting(page, tmp_path, name="mlp", class_names=CLASSES, input_shape=shape) as (site, bundle):
        look = (("read", "count"), ("read", "counts"))
        device = Phone(tmp_path / "profile", tmp_path, site.url)
        told = device.do_alone(
            *(("open", site.url), ("until", "ready"), ("choose", "sandal"), ("tap", "camera"), ("tap", "shutter")),
            *(("untilText", ["count", "1 example "]), ("tap", "camera"), ("choose", "trousers")),
            *(("upload", ["pictures", [str(next(photos.glob("boot/0.png")))]]), ("untilText", ["count", "2 examples"])),
            *(("upload", ["folder", [str(photos)]]), ("untilText", ["count", "5 examples"]), *look),
            *(("press", "Delete picture, sandal"), ("untilText", ["count", "4 examples"]), *look),
            *(("restart", None), ("open", site.url), ("until", "ready"), *look, *TRAINED),
        )
        assert told.read[:2] == ["5 examples on this phone", "boot: 2sandal: 1trousers: 2"]
        assert told.read[2:4] == told.read[4:6] == ["4 examples on this phone", "boot: 2trousers: 2"]
        check_taken(told, site, bundle, tmp_path, run, examples=4)


def test_folders_of_other_classes_and_broken_pictures_add_nothing(page: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "boot").rename(photos / "cat")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with collecting(page, tmp_path, name="mlp", class_names=CLASSES, input_shape=(1, 8, 8)) as (site, _):
        told = Phone(tmp_path / "profile", tmp_path, site.url).do_alone(
            *(("open", site.url), ("until", "ready"), ("upload", ["folder", [str(photos)]]), ("untilError", None)),
            *(("read", "error"), ("upload", ["pictures", [str(tmp_path / "broken.png")]])),
            *(("untilText", ["error", "broken"]), ("read", "error"), ("read", "count")),
        )
    assert told.read == [
        "This folder contains a folder cat, which is not one of the classes. Nothing was added.",
        "broken.png cannot be read as a picture and was left out.",
        "None yet.",
    ]


def test_a_picture_that_is_left_out_is_still_told_of_when_others_are_added(
    page: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    files = [str(photos / "boot" / "0.png"), str(tmp_path / "broken.png"), str(photos / "boot" / "1.png")]
    with collecting(page, tmp_path, name="mlp", class_names=CLASSES, input_shape=(1, 8, 8)) as (site, _):
        told = Phone(tmp_path / "profile", tmp_path, site.url).do_alone(
            *(("open", site.url), ("until", "ready"), ("upload", ["pictures", files])),
            *(("untilText", ["count", "2 examples"]), ("ask", "document.querySelector('#trouble').innerText")),
            *(("upload", ["pictures", files[2:]]), ("untilText", ["told", "already"])),
            ("ask", "document.querySelector('#trouble').hidden"),
        )
    assert "broken.png cannot be read as a picture and was left out." in told.read[0]
    assert told.read[1] == "true", "until the person goes on"


def test_a_camera_that_is_opened_and_closed_in_haste_is_let_go(page: Path, tmp_path: Path) -> None:
    """Also by the training, while the person is still asked whether the page may use it."""
    watched = """const media = navigator.mediaDevices, open = media.getUserMedia.bind(media);
        window.tracks = [];
        media.getUserMedia = async (wanted) => {
            const stream = await open(wanted);
            tracks.push(...stream.getTracks());
            return stream;
        };"""

    def live(opened: int) -> tuple[str, str]:
        """Number of cameras that are in use, once so many were opened."""
        wait = f"while (tracks.length < {opened}) await new Promise((go) => setTimeout(go, 20));"
        return "ask", f"(async () => {{ {wait} return tracks.filter((each) => each.readyState === 'live').length; }})()"

    with collecting(page, tmp_path, name="mlp", class_names=CLASSES, input_shape=(1, 8, 8)) as (site, _):
        told = Phone(tmp_path / "profile", tmp_path, site.url).do_alone(
            *(("without", watched), ("open", site.url), ("until", "ready")),
            *(("ask", "for (let i = 0; i < 3; i++) document.getElementById('camera').click()"), ("tap", "shutter")),
            *(("untilText", ["count", "1 example "]), live(2), ("tap", "camera"), live(2)),
            *(("ask", "for (const id of ['camera', 'start']) document.getElementById(id).click()"), ("until", "done")),
            live(3),
        )
    assert [told.read[place] for place in (1, 2, 4)] == ["1", "0", "0"]


def test_movement_in_windows_with_a_label(page: Path, tmp_path: Path, run: Command) -> None:
    recipe = {"name": "har-transformer", "class_names": ACTIVITIES, "input_shape": (25, 6), "optimizer": "adamw"}
    with collecting(page, tmp_path, **recipe) as (site, bundle):
        ask(site, {**SETTINGS, "lr": 0.001})
        told = Phone(tmp_path / "profile", tmp_path, site.url).do_alone(
            *(("open", site.url), ("until", "ready"), ("choose", "walking"), ("tap", "record")),
            *(
                ("untilText", ["told", "Recording. "]),
                ("move", 2.2),
                ("tap", "record"),
                ("untilText", ["told", "added"]),
            ),
            *(("read", "counts"), *TRAINED),
        )
        name, _, count = told.read[0].partition(": ")
        assert (name, count) == ("walking", "4"), "windows of half a second, in more than two seconds"
        check_taken(told, site, bundle, tmp_path, run, examples=int(count))


def test_a_recording_ends_with_the_training_that_it_is_given_to(page: Path, tmp_path: Path, run: Command) -> None:
    recipe = {"name": "har-transformer", "class_names": ACTIVITIES, "input_shape": (25, 6), "optimizer": "adamw"}
    record = ("tap", "record"), ("untilText", ["told", "Recording. "]), ("move", 1.2)
    with collecting(page, tmp_path, **recipe) as (site, bundle):
        ask(site, {**SETTINGS, "lr": 0.001})
        told = Phone(tmp_path / "profile", tmp_path, site.url).do_alone(
            *(
                ("open", site.url),
                ("until", "ready"),
                *record,
                ("tap", "record"),
                ("untilText", ["count", "2 examples"]),
            ),
            *(("choose", "walking"), *record, *TRAINED, ("read", "counts"), ("read", "record")),
        )
        assert told.read == ["sitting: 2walking: 2", "Record"]
        check_taken(told, site, bundle, tmp_path, run, examples=4)


def test_a_phone_without_sensors_says_so(page: Path, tmp_path: Path) -> None:
    with collecting(page, tmp_path, name="har-transformer", input_shape=(25, 6)) as (site, _):
        told = Phone(tmp_path / "profile", tmp_path, site.url).do_alone(
            *(("open", site.url), ("until", "ready"), ("tap", "record"), ("untilError", None), ("read", "error"))
        )
    assert told.read == ["This phone reports no movement. Allow motion sensors in the settings of this page."]


def test_typed_text(page: Path, tmp_path: Path, run: Command) -> None:
    with collecting(page, tmp_path, name="char-lstm", input_shape=(20,)) as (site, bundle):
        told = Phone(tmp_path / "profile", tmp_path, site.url).do_alone(
            *(("open", site.url), ("until", "ready"), ("type", ["typed", "Shall I compare"]), ("read", "enough")),
            *(
                ("type", ["typed", SONNET]),
                ("read", "enough"),
                ("tap", "add-text"),
                ("untilText", ["count", "3 examples"]),
            ),
            *(("type", ["typed", SONNET]), ("tap", "add-text"), ("untilText", ["told", "already"]), ("read", "shelf")),
            *TRAINED,
        )
        assert told.read[:2] == ["6 more characters are needed.", "Enough for 3 examples."]
        assert told.read[2].startswith(SONNET[:20])
        check_taken(told, site, bundle, tmp_path, run, examples=3)


def test_characters_that_the_model_does_not_know_are_told_of(page: Path, tmp_path: Path) -> None:
    with collecting(page, tmp_path, name="char-lstm", input_shape=(20,)) as (site, _):
        told = Phone(tmp_path / "profile", tmp_path, site.url).do_alone(
            *(("open", site.url), ("until", "ready"), ("type", ["typed", f"€{SONNET}"]), ("tap", "add-text")),
            *(("untilText", ["told", "added"]), ("read", "enough")),
        )
    assert told.read == ["1 character that the model does not know counts as a space."]


def test_examples_and_update_survive_a_file_that_is_picked_again(phone: Callable[..., Phone], site: Site) -> None:
    ask(site, SETTINGS)
    device = phone("again")
    told = device.do(
        *(("untilText", ["told", "added"]), ("tap", "start"), ("until", "done"), ("pick", str(device.data))),
        *(("untilText", ["told", "already"]), ("read", "count"), ("tap", "send"), ("untilStatus", "Sent")),
    )
    assert told.read == ["29 examples on this phone"]


def test_files_that_come_at_once_are_taken_one_after_the_other(phone: Callable[..., Phone], site: Site) -> None:
    ask(site, SETTINGS)
    device = phone("thrice")
    picked = ("ask", 3 * picking(device.data))
    told = device.do_alone(
        *(("open", site.url), ("until", "ready"), picked, ("untilText", ["told", "already"]), ("wait", 500)),
        *(("read", "told"), ("read", "count")),
    )
    assert told.read[1:] == ["That is here already: nothing was added.", "29 examples on this phone"]
