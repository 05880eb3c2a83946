"""Everybody can use the page: small screens, large fonts, both color schemes, screen readers, keyboards, languages."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from emulated_phone import SETTINGS, Phone, ask
from phone_site import Site

SMALL = [360, 780]


@pytest.fixture
def audits(phone: Callable[..., Phone], site: Site) -> dict[str, Any]:
    """What is wrong with the page, by how it is looked at, with examples, after training and with an error."""
    ask(site, SETTINGS)
    device = phone("looked at")
    ways = {
        "light": (("prefer", {"colorScheme": "light"}),),
        "dark": (("prefer", {"colorScheme": "dark"}),),
        "large": (("font", 200),),
        "German": (("select", ["language", "de"]),),
    }
    begun = (
        ("screen", SMALL),
        ("tap", "start"),
        ("until", "done"),
        ("offline", True),
        ("tap", "send"),
        ("untilError", None),
    )
    looks = [action for way in ways.values() for action in (*way, ("audit", None))]
    told = device.do(*begun, *looks)
    return dict(zip(ways, map(json.loads, told.read), strict=True))


def test_everybody_can_use_the_page(audits: dict[str, Any]) -> None:
    for way, found in audits.items():
        assert not found["unnamed"], f"{way}: controls without a name for screen readers"
        assert not found["faint"], f"{way}: text with a contrast below 4.5 : 1"
        assert not found["wide"], f"{way}: wider than the screen"
        assert not found["small"], f"{way}: smaller than a finger"
        assert found["visited"] == found["order"], f"{way}: the Tab key goes another way, or leaves no mark"
    assert {"Train", "Send", "Language", "Progress of the training"} <= set(audits["light"]["names"])
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
