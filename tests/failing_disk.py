"""Disks that fail where a write is to become durable: the power is cut, or there is no space left."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


class PowerCutError(BaseException):
    """The machine lost its power: nothing catches it, and nothing is saved."""


@contextmanager
def full_disk() -> Iterator[None]:
    """Let every sync fail for want of space."""

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        yield
