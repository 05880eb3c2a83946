"""The bundle: the folder that a device trains from.

    manifest.json           what is in the folder and what must agree between devices (below)
    weights.safetensors     the shared tensors of round 0 (`weights`)
    local.safetensors       initial personal tensors, only if the model has any
    train_step.onnx, eval_step.onnx
                            of the engine onnxruntime, specified in `export/step/training_step.py`
    train_step.direct.onnx  the same step in another form, only if it was asked for and differs (`FORMS`)
    training_model.onnx, eval_model.onnx, optimizer_model.onnx, checkpoint
                            onnxruntime-training's artifacts, under the names that its own applications expect; without
                            optimizer_model.onnx for SGD with momentum, which onnxruntime-training lacks

`manifest.json`, UTF-8 JSON of schema version 1 to 4:

    schema        1 where the first entries of `formats.interface` can describe the model, 2 otherwise; 3, with either
                  entries, for a model with updates (`fedpara_edge.factors.update`), and 4 for one whose bases have
                  momentum
    model         name given at export
    layout        layers and tensors (`layout.Layout.to_json`)
    input, label, output, loss; or, always with schema 2, inputs, heads, others
                  entries of `formats.interface`; preprocessing is inside the graphs
    optimizer     {"name": "sgd" | "adamw", and its constants}
    engines       names of the engines whose files are present
    graph         sha256 of the forward graph without its parameters
    local         sha256 of local.safetensors, as personal tensors start out alike everywhere; null if there is none
    files         {name: {"sha256", "bytes"}} for every other file of the folder
    fingerprint   sha256 of all of the above that must agree between devices: everything but model, engines and files
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.errors import InputError, WrongBundleError, brief, brief_text
from fedpara_edge.factors.layout import Layout
from fedpara_edge.factors.update import check_updates
from fedpara_edge.formats.graphfile import read_graph
from fedpara_edge.formats.interface import Interface, is_text
from fedpara_edge.storage.atomic import sha256_of
from fedpara_edge.storage.tensorfile import TensorFile, write_tensors
from fedpara_edge.storage.tensortable import strict_json
from fedpara_edge.storage.wholefile import read_text

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
INITIAL_PERSONAL = "local.safetensors"
"""File of the initial personal tensors."""
INITIAL_PERSONAL_FORMAT = "fedpara-edge/local"
ORT_TRAINING_FILES = ("training_model.onnx", "eval_model.onnx", "optimizer_model.onnx", "checkpoint")
TRAIN_STEP, EVAL_STEP = ONNXRUNTIME_FILES = ("train_step.onnx", "eval_step.onnx")
FORMS = {"default": TRAIN_STEP, "direct": "train_step.direct.onnx"}
"""Files of the training step of the engine onnxruntime by its form, of which only the first is in every bundle.

In the direct form, convolutions stay as the model has them; in the other, those of small images are products by
Winograd's filtering, or convolutions of a whole batch as one image.
"""
ENGINES = ("ort-training", "onnxruntime")

REMEDY = "copy the whole bundle again"
"""Remedy for a bundle whose files are missing, damaged or changed."""

SCHEMAS = (1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of `manifest.json`; the module describes the fields."""

    model: str
    layout: Layout
    interface: Interface
    optimizer: Mapping[str, Any]
    engines: tuple[str, ...]
    graph: str
    local: str | None
    files: Mapping[str, Mapping[str, Any]]

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of what must agree between devices."""
        data = self._plain()
        for name in ("model", "engines", "files"):
            del data[name]
        return hashlib.sha256(_canonical(data)).hexdigest()

    @property
    def forms(self) -> tuple[str, ...]:
        """Forms of the training step of the engine onnxruntime whose files are there."""
        return tuple(form for form, file in FORMS.items() if file in self.files)

    @property
    def _schema(self) -> int:
        if any(layer.base_momentum for layer in self.layout.layers):
            return 4
        return 3 if self.layout.held else 1 if self.interface.is_first else 2

    def _plain(self) -> dict[str, Any]:
        return {
            "schema": self._schema,
            "model": self.model,
            "layout": self.layout.to_json(),
            **self.interface.to_json(),
            "optimizer": dict(self.optimizer),
            "engines": list(self.engines),
            "graph": self.graph,
            "local": self.local,
            "files": {name: dict(entry) for name, entry in self.files.items()},
        }


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write a `manifest.json` that lists all other files of a folder; return it with their sizes and hashes."""
    files = {
        file.name: {"sha256": sha256_of(file), "bytes": file.stat().st_size}
        for file in sorted(folder.iterdir())
        if file.name != MANIFEST
    }
    complete = replace(manifest, files=files)
    data = {**complete._plain(), "fingerprint": complete.fingerprint}
    (folder / MANIFEST).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return complete


@dataclass(frozen=True)
class Bundle:
    """A verified bundle folder.

    Args:
        path: The folder.
        manifest: Content of its `manifest.json`.
    """

    path: Path
    manifest: Manifest

    @property
    def interface(self) -> Interface:
        """Inputs, outputs and labels of the model."""
        return self.manifest.interface

    def file(self, name: str) -> Path:
        """Path of a file of the bundle."""
        return self.path / name

    def read_graph(self, name: str) -> bytes:
        """Content of a graph file of the bundle, from which nothing reaches beyond it (`graphfile`).

        Raises:
            WrongBundleError: The file can't be read, or has something that no release of this project writes.
        """
        path = self.file(name)
        try:
            return read_graph(path, training=name in ORT_TRAINING_FILES)
        except OSError as error:
            raise WrongBundleError(f"{path}: expected a graph, found {error.strerror}; {REMEDY}") from error
        except ValueError as error:
            raise WrongBundleError(
                f"{path}: expected a self-contained graph, found {error}; {REMEDY}, from a source you trust"
            ) from error

    def read_initial_personal(self) -> dict[str, NDArray[Any]]:
        """Initial personal tensors, by name; none if the model has no personal tensors.

        Raises:
            WrongBundleError: `local.safetensors` is damaged, or has other tensors than the layout.
        """
        if INITIAL_PERSONAL not in self.manifest.files:
            return {}
        path = self.file(INITIAL_PERSONAL)
        expected = {tensor.name: (tensor.shape, tensor.dtype) for tensor in self.manifest.layout.with_role("personal")}
        with TensorFile(path, format=INITIAL_PERSONAL_FORMAT, error=WrongBundleError, remedy=REMEDY) as file:
            if {name: (entry.shape, entry.dtype) for name, entry in file.entries.items()} != expected:
                raise WrongBundleError(
                    f"{path}: expected the personal tensors of {MANIFEST} ({len(expected)}), found others "
                    f"({len(file.entries)}); {REMEDY}"
                )
            tensors = {name: file.read(name) for name in file.entries}
        for name, tensor in tensors.items():
            if not np.isfinite(tensor).all():
                raise WrongBundleError(f"{path}: tensor {name!r}: expected finite values, found NaN or Inf; {REMEDY}")
        return tensors


def write_initial_personal(folder: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write `local.safetensors` into the folder of a bundle being made, unless there are no personal tensors."""
    if tensors:
        write_tensors(folder / INITIAL_PERSONAL, tensors, {"format": INITIAL_PERSONAL_FORMAT, "version": 1})


def open_bundle(path: Path | str) -> Bundle:
    """Read a bundle and verify that its files are all there and unchanged.

    Raises:
        InputError: There is no folder at `path`.
        WrongBundleError: The folder is not a bundle, has another schema, or a file of it is missing or changed.
    """
    path = Path(path)
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise InputError(f"{path}: expected a bundle folder, found {found}; check the path")
    manifest = read_manifest(path / MANIFEST)
    for name, entry in manifest.files.items():
        file = path / name
        if Path(name).name != name or not _is_file(file):
            raise WrongBundleError(f"{file}: expected a file that {MANIFEST} lists, found nothing; {REMEDY}")
        if file.stat().st_size != entry["bytes"] or sha256_of(file) != entry["sha256"]:
            raise WrongBundleError(
                f"{file}: expected the content that {MANIFEST} lists (sha256 "
                f"{brief_text(entry['sha256'], max_length=12)}), found other content; {REMEDY}"
            )
    return Bundle(path, manifest)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for the system
        return False


def read_manifest(path: Path) -> Manifest:
    """Read a `manifest.json` and verify its fingerprint; the files that it lists are not looked at.

    Raises:
        WrongBundleError: It can't be read, has another schema, or was changed.
    """
    try:
        data = strict_json(read_text(path))
    except OSError as error:
        raise WrongBundleError(
            f"{path}: expected a bundle's manifest, found {error.strerror}; check the path"
        ) from error
    except ValueError as error:
        raise WrongBundleError(f"{path}: expected JSON, found {error}; {REMEDY}") from error
    schema = data.get("schema") if isinstance(data, dict) else type(data).__name__
    if type(schema) is not int or schema not in SCHEMAS:
        raise WrongBundleError(
            f"{path}: expected schema 1, 2, 3 or 4, found {brief_text(schema)}; use the release that exported it"
        )
    is_first = schema == 1 or (schema in (3, 4) and "heads" not in data)
    try:
        for name, fits in _FITTING.items():
            if not fits(data[name]):
                raise ValueError(f"{name} {brief(data[name])}")
        manifest = Manifest(
            model=data["model"],
            layout=Layout.from_json(data["layout"]),
            interface=Interface.from_json(data, first=is_first),
            optimizer=data["optimizer"],
            engines=tuple(data["engines"]),
            graph=data["graph"],
            local=data["local"],
            files={name: {key: entry[key] for key in ("sha256", "bytes")} for name, entry in data["files"].items()},
        )
        check_updates(manifest.layout)
        fingerprint, stated = manifest.fingerprint, data["fingerprint"]
    except (AttributeError, KeyError, TypeError, ValueError, InputError) as error:
        raise WrongBundleError(
            f"{path}: expected the fields of schema {schema}, found {_fault(error)}; {REMEDY}"
        ) from error
    if fingerprint != stated:
        raise WrongBundleError(
            f"{path}: expected fingerprint {fingerprint[:12]}…, found {brief_text(stated, max_length=12)}: it was "
            f"changed; {REMEDY}"
        )
    return manifest


def _is_list_of_text(found: Any) -> bool:
    return isinstance(found, list) and all(map(is_text, found))


def _is_optimizer(found: Any) -> bool:
    if not isinstance(found, dict) or not found.keys() >= _CONSTANTS.get(str(found.get("name")), {"none"}):
        return False
    constants = {name: value for name, value in found.items() if name != "name"}
    betas = constants.pop("betas", [0, 0])
    return isinstance(betas, list) and len(betas) == 2 and all(map(_is_number, (*betas, *constants.values())))


def _is_number(found: Any) -> bool:
    return type(found) in (int, float) and abs(found) <= sys.float_info.max


def _are_files(found: Any) -> bool:
    return isinstance(found, dict) and all(
        is_text(name)
        and isinstance(entry, dict)
        and is_text(entry["sha256"])
        and type(entry["bytes"]) is int
        and entry["bytes"] >= 0
        for name, entry in found.items()
    )


_CONSTANTS: Mapping[str, set[str]] = {"sgd": set(), "adamw": {"betas", "eps", "weight_decay"}}
"""Constants that the manifest must state, by optimizer."""
_FITTING: Mapping[str, Callable[[Any], bool]] = {
    "model": is_text,
    "optimizer": _is_optimizer,
    "engines": _is_list_of_text,
    "graph": is_text,
    "local": lambda found: found is None or is_text(found),
    "files": _are_files,
}
"""Functions that tell whether a field may be what was found; those of layout and interface check themselves."""


def _fault(error: Exception) -> str:
    return f"no field {error}" if isinstance(error, KeyError) else brief_text(str(error), max_length=200)


def _canonical(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
