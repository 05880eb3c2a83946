"""`fedpara-edge inspect`: what is in a file or folder of ours."""

from __future__ import annotations

import json as json_text
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from fedpara_edge.cli.command import Command
from fedpara_edge.cli.options import PATH
from fedpara_edge.cli.output import emit, json_option, megabytes, table
from fedpara_edge.cli.streams import printable
from fedpara_edge.codecs.codec import in_order
from fedpara_edge.codecs.sums import FIELD as SUMS
from fedpara_edge.errors import InputError, InvalidUpdateError, brief
from fedpara_edge.factors.compose import attainable_rank, factor_count
from fedpara_edge.factors.layout import LayerSpec, Layout, plain
from fedpara_edge.formats.bundle import MANIFEST, open_bundle
from fedpara_edge.formats.change import FORMAT as CHANGE_FORMAT
from fedpara_edge.formats.encoded import bits_by_tensor, open_encoded
from fedpara_edge.formats.folded import FORMAT as FOLDED_FORMAT
from fedpara_edge.formats.folded import read_folded, stated_digest
from fedpara_edge.formats.serverstate import FORMAT as SERVER_FORMAT
from fedpara_edge.formats.update import FORMAT as UPDATE_FORMAT
from fedpara_edge.formats.weights import FORMAT as WEIGHTS_FORMAT
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.installation import check_package
from fedpara_edge.storage.digest import FIELD, check_digest, read_checked
from fedpara_edge.storage.tensorfile import TensorFile


@click.command("inspect", cls=Command)
@click.argument("path", type=PATH)
@click.option(
    "--weights",
    type=PATH,
    help="Weights of the same bundle, which name the tensors of an update or a change.",
)
@json_option
def command(path: Path, weights: Path | None, json: bool) -> None:
    """Show what is in PATH: a bundle, weights, an update, a change, a folded model, or the state of a device or server.

    An update or a published change does not name its tensors: with --weights they are shown with the bits that each
    parameter takes.
    """
    is_state = False
    if weights is not None:
        result = _encoded(path, weights)
    elif path.is_dir():
        is_state = not (path / MANIFEST).exists()
        result = _state(path) if is_state else _bundle(path)
    elif path.suffix == ".onnx":
        result = _folded(path)
    elif path.exists():
        result = _file(path)
    else:
        raise InputError(f"{path}: expected a bundle, weights, update or state, found nothing")
    emit(result, _state_text(result) if is_state else _text(result), as_json=json)


def _bundle(path: Path) -> dict[str, Any]:
    manifest = open_bundle(path).manifest
    return {
        "path": str(path),
        "format": "bundle",
        "model": manifest.model,
        "fingerprint": manifest.fingerprint,
        **manifest.interface.to_json(),
        "optimizer": dict(manifest.optimizer),
        "engines": list(manifest.engines),
        "files": {name: entry["bytes"] for name, entry in manifest.files.items()},
        **_layout(manifest.layout),
    }


def _state(path: Path) -> dict[str, Any]:
    files = [_file(file) for file in sorted(path.glob("*.safetensors"), key=_in_counting_order)]
    if not files:
        from fedpara_edge.simulation.folder import METRICS

        if (path / METRICS).is_file():
            raise InputError(
                f"{path}: expected a bundle or a state folder, found the {METRICS} of a run; fedpara-edge report shows "
                "these"
            )
        raise InputError(f"{path}: expected a bundle or a state folder, found neither {MANIFEST} nor *.safetensors")
    return {"path": str(path), "format": "state", "of": _owner([file["format"] for file in files]), "files": files}


def _owner(formats: Sequence[Any]) -> str | None:
    """Whose state files of these formats are, `server` or `device`; None if they are no state of a single one."""
    check_package("device_runtime")
    from device_runtime.statefiles import COMMITTED_FORMAT, PROGRESS_FORMAT

    known = {"server": [SERVER_FORMAT], "device": [COMMITTED_FORMAT, PROGRESS_FORMAT]}
    return next((owner for owner, its in known.items() if all(found in its for found in formats)), None)


def _in_counting_order(path: Path) -> list[tuple[int, str]]:
    """Key that sorts round-2 before round-10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name)]


def _folded(path: Path) -> dict[str, Any]:
    spec, content = read_folded(path)
    return {
        "path": str(path),
        "format": FOLDED_FORMAT,
        **spec.to_plain(),
        "bytes": len(content),
        "digest": stated_digest(content),
    }


def _file(path: Path) -> dict[str, Any]:
    with TensorFile(path, format=None, error=InputError) as file:
        header = _header(file)
        layout = file.header.get("layout")
        tensors = {
            name: {"dtype": entry.dtype, "shape": list(entry.shape), "bytes": entry.nbytes}
            for name, entry in file.entries.items()
        }
        size = file.size_bytes
        digest = _checked_digest(file)
    result = {"path": str(path), **header, "bytes": size, **digest, "tensors": tensors}
    return result if layout is None else {**result, **_layout(Layout.from_json(layout))}


def _checked_digest(file: TensorFile) -> dict[str, Any]:
    """The digest of a file that should state one, compared with the content; None where an older release wrote it."""
    found = file.header["format"]
    if found == WEIGHTS_FORMAT and FIELD in file.header:
        read_weights(file.path)
    elif found == UPDATE_FORMAT and FIELD in file.header:
        check_digest(file, "")  # of the header alone; the sums of the change are compared with --weights
    elif FIELD in file.header:
        read_checked(file)
    elif found != WEIGHTS_FORMAT and (found in (UPDATE_FORMAT, CHANGE_FORMAT) or _owner([found]) is None):
        return {}
    return {FIELD: file.header.get(FIELD)}


def _encoded(path: Path, weights: Path) -> dict[str, Any]:
    base = read_weights(weights)
    tensors = in_order(base.layout.shared)
    try:
        with open_encoded(path, base) as file:
            bits = bits_by_tensor(file, tensors)
            header, size = _header(file), file.size_bytes
    except InvalidUpdateError as error:  # the same exit code as without weights
        raise InputError(str(error), code=error.code) from error
    return {
        "path": str(path),
        **header,
        "bytes": size,
        "encoded": [
            {"name": tensor.name, "shape": list(tensor.shape), "parameters": tensor.size, "bits": bits[tensor.name]}
            for tensor in tensors
        ],
        "shared_parameters": base.layout.shared_parameters,
        "dense_parameters": base.layout.dense_parameters,
    }


def _header(file: TensorFile) -> dict[str, Any]:
    """The header of a file without the names that our own statements have, and without sums, which tell nobody."""
    header = {name: value for name, value in file.header.items() if name not in _OURS and name != SUMS}
    try:
        json_text.dumps(header, allow_nan=False)
    except (ValueError, RecursionError) as error:  # 1e999 is JSON, and infinite
        raise InputError(
            f"{file.path}: expected a header of finite numbers, found one that is no JSON: {error}"
        ) from error
    return header


def _layout(layout: Layout) -> dict[str, Any]:
    return {
        "layers": [_layer(layout, layer) for layer in layout.layers],
        "shared_parameters": layout.shared_parameters,
        "personal_parameters": sum(tensor.size for tensor in layout.with_role("personal")),
        "dense_parameters": layout.dense_parameters,
    }


def _layer(layout: Layout, layer: LayerSpec) -> dict[str, Any]:
    return {
        **plain(layer),
        "attainable_rank": attainable_rank(layer),
        "full_rank": min(layer.matrix_shape),
        "parameters": factor_count(layer),
        "dense_parameters": layer.dense_parameters,
        "share": factor_count(layer) / layer.dense_parameters,
        "personal": [part for part, tensor in layout.parts(layer).items() if tensor.role == "personal"],
    }


def _state_text(result: dict[str, Any]) -> str:
    what = f"state of a {result['of']}" if result["of"] else f"{len(result['files'])} files"
    return "\n\n".join([f"{printable(result['path'])}: {what}", *map(_text, result["files"])])


def _text(result: dict[str, Any]) -> str:
    lines = [f"{printable(result['path'])}: {_value(result['format'])}"]
    shown = {name: value for name, value in result.items() if name not in _LONG}
    if FIELD in shown and shown[FIELD] is None:
        shown[FIELD] = "none, as a release up to 0.2 wrote it: damage to its values goes unnoticed"
    lines += [f"  {printable(name)}: {_value(value)}" for name, value in shown.items()]
    if "layers" in result:
        lines += ["", _layer_table(result)]
    elif "encoded" in result:
        lines += ["", _bits_table(result)]
    elif "tensors" in result:
        rows = [
            (printable(name), t["dtype"], _shape(t["shape"]), f"{t['bytes']:,}")
            for name, t in result["tensors"].items()
        ]
        lines += ["", table(("tensor", "dtype", "shape", "bytes"), rows)]
    return "\n".join(lines)


_LONG = (
    "path",
    "format",
    "layers",
    "tensors",
    "encoded",
    "shared_parameters",
    "personal_parameters",
    "dense_parameters",
)
_OURS = frozenset((*_LONG, "bytes", "files", "layout")) - {"format"}


def _bits_table(result: dict[str, Any]) -> str:
    rows = [
        (printable(part["name"]), _shape(part["shape"]), f"{part['parameters']:,}", f"{part['bits']:.2f}")
        for part in result["encoded"]
    ]
    shared, dense, size = result["shared_parameters"], 4 * result["dense_parameters"], result["bytes"]
    return (
        f"{table(('tensor', 'shape', 'parameters', 'bits each'), rows)}\n\n{size:,} bytes with the header, "
        f"{8 * size / max(shared, 1):.2f} bits for each of {shared:,} parameters: 1/{4 * shared / size:.0f} of them in "
        f"float32, 1/{dense / size:.0f} of the dense model's {megabytes(dense)}"
    )


def _layer_table(result: dict[str, Any]) -> str:
    has_updates = any(layer["kind"] == "update" for layer in result["layers"])
    rows = [
        (
            printable(layer["name"]),
            f"{layer['kind']}{' tanh' if layer['tanh'] else ''}",
            _shape(layer["shape"]),
            layer["rank"] or "-",
            f"{layer['attainable_rank']} of {layer['full_rank']}",
            f"{layer['parameters']:,}",
            f"{layer['share']:.1%}",
            *(_of_update(layer) if has_updates else ()),
        )
        for layer in result["layers"]
    ]
    header = ["layer", "kind", "shape", "rank", "attainable rank", "parameters", "of dense"]
    header += ["scale", "reset every", "base momentum"] if has_updates else []
    shared, dense = result["shared_parameters"], result["dense_parameters"]
    personal = f", {result['personal_parameters']:,} personal" if result["personal_parameters"] else ""
    return (
        f"{table(header, rows)}\n\n{shared:,} shared parameters{personal} ({megabytes(4 * shared)} in float32), "
        f"{shared / max(dense, 1):.1%} of the dense model's {dense:,}"
    )


def _of_update(layer: Mapping[str, Any]) -> tuple[str, str, str]:
    """Cells of what an update alone has."""
    if layer["kind"] != "update":
        return "-", "-", "-"
    return f"{layer['scale']:g}", f"{layer['reset_every']}", f"{layer.get('base_momentum', 0.0):g}"


def _shape(shape: list[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _value(value: Any, depth: int = 4) -> str:
    if isinstance(value, Mapping | list) and not depth:
        return brief(value)
    if isinstance(value, Mapping):
        items = ((key, item) for key, item in value.items() if item is not None)
        return ", ".join(f"{printable(key)} {_value(item, depth - 1)}" for key, item in items)
    if isinstance(value, list):
        kinds = {Mapping if isinstance(item, Mapping) else type(item) for item in value}
        between = "x" if kinds <= {int} else "; " if Mapping in kinds else ", "
        return between.join(_value(item, depth - 1) for item in value)
    return printable(str(value))
