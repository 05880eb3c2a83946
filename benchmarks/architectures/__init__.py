"""Architectures of the kinds that people train on devices, small enough to export and train in seconds.

Each family is a module with a table `ARCHITECTURES`; the models are written for this project.
"""

from __future__ import annotations

from architectures import audio, images, language, mobile, points, segmentation, sequences, signals, tables, vision
from architectures.architecture import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    each.name: each
    for family in (audio, signals, sequences, mobile, images, vision, segmentation, points, language, tables)
    for each in family.ARCHITECTURES
}
"""All architectures by name."""
