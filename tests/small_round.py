"""A round of a tiny model, for tests: its layout, its weights, and update files, good ones and others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fedpara_edge.codecs import find_encoder
from fedpara_edge.factors.compose import factor_role, part_shapes
from fedpara_edge.factors.layout import Kind, LayerSpec, Layout, TensorSpec
from fedpara_edge.factors.rank import layer_spec
from fedpara_edge.factors.update import velocity_spec
from fedpara_edge.formats.update import UpdateHeader, write_update
from fedpara_edge.formats.weights import Weights, read_weights, write_weights

FINGERPRINT = "f" * 64


def layer(name: str, shape: tuple[int, ...], *, kind: Kind = "fedpara", rank: int = 2, tanh: bool = False) -> LayerSpec:
    """A linear layer, or a convolution in tensor form, by the length of `shape`."""
    return layer_spec(shape, name=name, kind=kind, form="tensor", rank=0 if kind == "dense" else rank, tanh=tanh)


def layout_of(*layers: LayerSpec) -> Layout:
    """The factors (or the weight) and a bias for each of the layers."""
    tensors = []
    for spec in layers:
        for part, shape in part_shapes(spec).items():
            role = factor_role(spec, part)
            tensors.append(tensor(f"{spec.name}.{part}", shape, spec.name, part, role))
        tensors.append(tensor(f"{spec.name}.bias", spec.shape[:1], spec.name, "bias"))
        if spec.base_momentum:
            tensors.append(velocity_spec(spec))
    return Layout(layers, tuple(tensors))


def tensor(
    name: str,
    shape: tuple[int, ...],
    layer: str = "",
    part: Any = "other",
    role: Any = "shared",
    dtype: str = "float32",
) -> TensorSpec:
    """A tensor that travels, unless told otherwise."""
    return TensorSpec(name=name, shape=shape, dtype=dtype, layer=layer, part=part, role=role)


LAYERS = (
    layer("conv", (4, 3, 3, 3)),
    layer("fc", (6, 5)),
    layer("own", (5, 6), kind="pfedpara"),
    layer("head", (3, 5), kind="dense"),
)
_PLAIN = layout_of(*LAYERS)
LAYOUT = Layout(
    LAYERS,
    (*_PLAIN.tensors, tensor("scale", ()), tensor("steps", (), role="frozen", dtype="int64")),
)


def random_tensors(layout: Layout, seed: int, deviation: float = 1.0) -> dict[str, NDArray[np.float32]]:
    """Gaussian values for all shared tensors and the bases of updates, whose velocities are zero."""
    random, tensors = np.random.default_rng(seed), layout.with_role("shared", "base")
    drawn = {t.name: np.asarray(deviation * random.standard_normal(t.shape), np.float32) for t in tensors}
    return drawn | {t.name: np.zeros(t.shape, np.float32) for t in layout.with_role("velocity")}


def start_round(folder: Path, layout: Layout = LAYOUT, *, number: int = 3) -> Weights:
    """Weights of that round, written to `folder` and read back."""
    path = folder / "base.safetensors"
    write_weights(path, Weights(FINGERPRINT, number, layout, random_tensors(layout, 1)))
    return read_weights(path)


def header(weights: Weights, client: str = "a", **changed: Any) -> UpdateHeader:
    """What an update from these weights says of itself."""
    fields: dict[str, Any] = {
        "fingerprint": weights.fingerprint,
        "round": weights.round,
        "base": weights.base,
        "client": client,
        "examples": 10,
        "steps": 4,
        "metrics": {"loss": 0.5},
        **changed,
    }
    return UpdateHeader(**fields)


def send(
    folder: Path,
    weights: Weights,
    client: str,
    *,
    change: Mapping[str, NDArray[np.float32]] | None = None,
    name: str | None = None,
    codec: str = "float32",
    **changed: Any,
) -> Path:
    """An update of that client, by default with random values that depend on its name."""
    path = folder / f"{name or client}.update"
    seed = int.from_bytes(client.encode(), "little") % 2**32
    values = random_tensors(weights.layout, seed, 0.1) if change is None else change
    write_update(path, header(weights, client, **changed), weights.layout, values, encoder=find_encoder(codec))
    return path


def forge(
    path: Path,
    weights: Weights,
    *,
    tensors: Mapping[str, NDArray[Any]] | None = None,
    drop: str | None = None,
    **changed: Any,
) -> Path:
    """An update file that the writer would refuse to write: any header fields, any tensors."""
    fields = {
        "format": "fedpara-edge/update",
        "version": 1,
        "codec": {"name": "float32", "version": 1},
        **asdict(header(weights, "mallory")),
        **changed,
    }
    if drop is not None:
        del fields[drop]
    values = random_tensors(weights.layout, 5, 0.1) if tensors is None else dict(tensors)
    save_file(values, path, metadata={"fedpara_edge": json.dumps(fields)})
    return path


def flat(tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """All values, in the order of names, in float64."""
    return np.concatenate([np.asarray(tensors[name], np.float64).reshape(-1) for name in sorted(tensors)])
