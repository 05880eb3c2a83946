"""Everybody can use the page: small screens, large fonts, both color schemes, screen readers, keyboards, languages."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from emulated_phone import SETTINGS, Phone, ask, collecting
from phone_site import Site

SMALL = [360, 780]


@pytest.fixture
def audits(page: Path, tmp_path: Path) -> dict[str, Any]:
    """What is wrong with the page by how it is looked at: with pictures of the camera, trained, and with an error."""
    classes = ("airplane", "automobile", "bird", "cat")
    ways = {
        "light": (("prefer", {"colorScheme": "light"}),),
        "dark": (("prefer", {"colorScheme": "dark"}),),
        "large": (("font", 200),),
        "German": (("select", ["language", "de"]),),
    }
    shots = [(("choose", name), ("tap", "shutter"), ("untilText", ["counts", name])) for name in classes[:3]]
    looks = [
        action
        for name, way in ways.items()
        for action in (*way, ("audit", None), ("picture", f"{tmp_path / name}.png"))
    ]
    with collecting(page, tmp_path, name="mlp", class_names=classes, input_shape=(3, 32, 32)) as (site, _):
        ask(site, SETTINGS, run="winter")
        told = Phone(tmp_path / "profile", tmp_path, site.url).do_alone(
            *(("open", site.url), ("screen", SMALL), ("until", "ready"), ("tap", "camera"), *chain(*shots)),
            ("tap", "identity summary"),
            *(("tap", "start"), ("until", "done"), ("offline", True), ("tap", "send"), ("untilError", None), *looks),
        )
    return dict(zip(ways, map(json.loads, told.read), strict=True))


def test_everybody_can_use_the_page(audits: dict[str, Any]) -> None:
    for way, found in audits.items():
        assert not found["unnamed"], f"{way}: controls without a name for screen readers"
        assert not found["faint"], f"{way}: text with a contrast below 4.5 : 1"
        assert not found["wide"], f"{way}: wider than the screen"
        assert not found["small"], f"{way}: smaller than a finger"
        assert found["visited"] == found["order"], f"{way}: the Tab key goes another way, or leaves no mark"
    assert {"Train", "Send", "Copy", "Language", "Progress of the training"} <= set(audits["light"]["names"])
    assert {"Trainieren", "Senden", "Sprache", "Fortschritt des Trainings"} <= set(audits["German"]["names"])


def test_the_language_is_that_of_the_person_and_stays(phone: Callable[..., Phone], site: Site) -> None:
    ask(site, SETTINGS)
    told = phone("speaks").do_alone(
        *(("open", site.url), ("until", "ready"), ("read", "start"), ("select", ["language", "de"]), ("read", "start")),
        *(("open", site.url), ("until", "ready"), ("read", "start"), ("read", "what")),
    )
    assert told.read[:3] == ["Train", "Trainieren", "Trainieren"]
    assert told.read[3].startswith("Wie sich das Modell verändert hat: etwa ")


def test_nothing_moves_for_people_who_do_not_want_it(phone: Callable[..., Phone], site: Site) -> None:
    ask(site, SETTINGS)
    moving = "[...document.querySelectorAll('*')].some((each) => getComputedStyle(each).transitionDuration !== '0s')"
    told = phone("still").do_alone(
        ("open", site.url), ("until", "ready"), ("prefer", {"reducedMotion": "reduce"}), ("ask", moving)
    )
    assert told.read == ["false"]
