"""Disks that fail where a write is to become durable: the power is cut, or there is no space left."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


class PowerCutError(BaseException):
    """The machine lost its power: nothing catches it, and nothing is saved."""


@dataclass
class Power:
    """The power supply while a test writes; `was_cut` tells how it ended."""

    was_cut: bool = False


@contextmanager
def power_cut(*, after: int) -> Iterator[Power]:
    """Cut the power in place of the sync that follows `after` others, and come out here."""
    power, left = Power(), after

    def sync(_: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise PowerCutError

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", sync)
        try:
            yield power
        except PowerCutError:
            power.was_cut = True


@contextmanager
def full_disk() -> Iterator[None]:
    """Let every sync fail for want of space."""

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        yield
