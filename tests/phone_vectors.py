"""Test vectors for implementations of the device in other languages, written by the library itself.

usage: python tests/phone_vectors.py FOLDER

`FOLDER/vectors.json` has, by kind, the arguments of each vector and what must come out; paths in it are relative to the
folder. docs/reference/device.md specifies the kinds.
"""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import encoded
import numpy as np
import small_net
import small_round
import test_statistics
import test_variable_lengths
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from securesystemslib.signer import CryptoSigner

from device_runtime import TrainConfig, open_data, open_engine, train
from device_runtime.batches import epoch_order
from device_runtime.engines.micro_batches import micro_batch_seed
from device_runtime.epochs import step_seed, sum_learning_rates
from device_runtime.schedule import learning_rate_at
from export import export_bundle
from fedpara_edge.codecs import find_encoder
from fedpara_edge.codecs.codec import in_order
from fedpara_edge.errors import DivergedError, InputError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.bundle import WEIGHTS, Bundle
from fedpara_edge.formats.change import publish_change
from fedpara_edge.formats.interface import ArraySpec, Head, Interface
from fedpara_edge.formats.serverstate import ServerState, write_server_state
from fedpara_edge.formats.update import write_update
from fedpara_edge.formats.weights import Weights, read_weights, write_weights
from fedpara_edge.losses import find_loss
from fedpara_edge.nn import convert, load_model
from fedpara_edge.trust.envelope import envelope_path, write_envelope
from fedpara_edge.trust.keys import public_text

EXAMPLES = 29
STATEFUL: dict[str, dict[str, Any]] = {
    "sgd": {"codec": "float32", "epochs": 2, "batch_size": 8, "drop_last": True, "clip_norm": 0.5, "seed": 7},
    "schedule": {"codec": "int8", "schedule": "cosine", "warmup_steps": 2, "batch_size": 5, "lr_decay": 0.9},
    "steps": {"codec": "int2", "schedule": "steps", "epochs": 3, "drop_factor": 0.5, "drop_every": 2},
    "momentum": {"codec": "float16", "algorithm": "fedprox:mu=0.2", "micro_batches": 3, "schedule": "linear"},
    "adamw": {"codec": "int4", "algorithm": "feddyn:alpha=0.05", "lr": 0.002, "batch_size": 12, "seed": 4294967295},
    "scaffold": {"codec": "uniform", "algorithm": "scaffold", "epochs": 2, "micro_batches": 2},
    "update": {"codec": "float32", "algorithm": "fedprox:mu=0.1", "epochs": 2, "batch_size": 8},
}
"""Calls of round 1 with what the device kept in round 0, by name."""
STATELESS: dict[str, dict[str, Any]] = {
    "statistics": {"codec": "uniform:step=1,by=tensor", "batch_size": 8, "seed": 3},
    "random": {"codec": "int8:block=64,entropy=0", "batch_size": 16},
    "tagger": {"codec": "bfloat16", "batch_size": 8, "micro_batches": 3, "epochs": 2},
    "updates": {"codec": "int8", "batch_size": 8, "epochs": 2},
}
"""Calls of devices that keep nothing, whose codecs round at random."""
UPDATES: dict[str, dict[str, Any]] = {
    "folded": {},
    "momentum": {"base_momentum": 0.6},
    "slow": {"base_momentum": 0.35, "reset_every": 2},
}
"""Options of the layers of networks of kind update."""
OPTIMIZERS = {"momentum": "momentum", "adamw": "adamw"}
CODECS = (
    *("float32", "float16", "bfloat16", "int8", "int8:entropy=0", "int4", "int4:block=50,entropy=0", "int3", "int2"),
    *("uniform", "uniform:step=0.01", "uniform:step=0.7,by=tensor", "uniform:step=6"),
)
CHANGES = ("heavy", "mixed", "zero", "subnormal", "large")
SCHEDULES: tuple[dict[str, Any], ...] = (
    {"lr": 0.1},
    {"lr": 0.4, "schedule": "linear", "warmup_steps": 3},
    {"lr": 0.3, "schedule": "cosine", "lr_decay": 0.992},
    {"lr": 0.05, "schedule": "steps", "drop_every": 2, "drop_factor": 0.3, "warmup_steps": 1},
)

_NAMES = ("cat", "dog", "owl")
DATA: tuple[tuple[str, tuple[str, ...] | None, dict[str, NDArray[Any]]], ...] = (
    ("cross_entropy", None, {"y": np.array([0, 2, 1], np.uint8)}),
    ("cross_entropy", None, {"y": np.array([0, 3, 1])}),
    ("cross_entropy", None, {"y": np.array([0.0, 1.0])}),
    ("cross_entropy:ignore_index=-100", None, {"y": np.array([0, -100, 1], np.int16)}),
    ("cross_entropy", _NAMES, {"y": np.array([0, 1, 1]), "y_names": np.array(["owl", "cat"])}),
    ("cross_entropy", _NAMES, {"y": np.array([0, 1, 1]), "y_names": np.array(["owl", "bat"])}),
    ("cross_entropy", None, {"y": np.array([0, 1, 1]), "y_names": np.array(["owl", "cat"])}),
    ("cross_entropy", _NAMES, {"y": np.array(["owl", "dog", "owl"])}),
    ("cross_entropy", None, {"y": np.array(["owl", "dog", "owl"])}),
    ("cross_entropy", ("7", "-8", "9"), {"y": np.array([9, 7, -8], np.int32)}),
    ("bce", None, {"y": np.array([0.5, 1], np.float32)}),
    ("bce", None, {"y": np.array([0.5, 1.5], np.float32)}),
    ("cross_entropy", None, {"y": np.array([0, 1]), "x": np.array([[0, np.nan], [0, 1]], np.float32)}),
    ("cross_entropy", None, {"y": np.array([0, 1]), "x": np.zeros((2, 2))}),
    ("cross_entropy", None, {"y": np.array([0, 1]), "x": np.zeros((3, 2), np.float32)}),
    ("cross_entropy", None, {"y": np.array([], np.int64)}),
)
"""Loss, names of the bundle's classes and arrays of files of examples."""


RFC_8032 = (
    "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
    "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
    "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
)
"""Secret keys of the tests 1 to 3 in section 7.1, hexadecimal."""
RUNS = ("winter", 'Träume "𝄞"\x7f')


def write_vectors(folder: Path) -> None:
    """Write all vectors to a new folder."""
    folder.mkdir()
    bundles = Bundles(folder / "bundles")
    vectors = {
        "orders": [
            {"examples": n, "seed": seed, "epoch": epoch, "order": epoch_order(n, seed=seed, epoch=epoch).tolist()}
            for n, seed, epoch in ((1, 0, 0), (5, 1, 0), (1000, 4294967295, 3), (4096, 7, 4294967296))
        ],
        "step_seeds": [
            {"seed": seed, "step": step, "is": step_seed(seed, step)}
            for seed, step in ((0, 0), (1, 17), (4294967295, 4294967296))
        ],
        "micro_batch_seeds": [
            {"seed": seed, "number": number, "is": micro_batch_seed(seed, number)}
            for seed in (0, 99)
            for number in (0, 2)
        ],
        "random_floats": [{"seed": seed, "values": _random_floats(seed).tolist()} for seed in (0, 5, 4294967295)],
        "rates": [_rates(given, round=number) for given in SCHEDULES for number in (0, 40)],
        "data": [*_data(folder)],
        "codecs": [*_codecs(folder)],
        "weights": [*_weights(folder, bundles)],
        "calls": [*_calls(folder, bundles)],
        "refusals": [*_refusals(folder, bundles)],
        "signatures": [*_signatures(folder)],
    }
    (folder / "vectors.json").write_text(json.dumps(vectors, indent=1), encoding="utf-8")


class Bundles:
    """Bundles of the vectors, each exported when first asked for.

    Args:
        folder: Folder to write them to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Bundle] = {}

    def small(self, optimizer: str) -> Bundle:
        """The small network of the tests, with personal tensors and dropout."""
        return self._once(optimizer, small_net.small_net(dropout=0.25), small_net.SHAPE, small_net.OPTIONS[optimizer])

    def normalized(self) -> Bundle:
        """A network with running statistics that travel, and nothing personal."""
        converted, _ = convert(test_statistics.net(), test_statistics.Factorization(kind="dense", batchnorm="train"))
        return self._once("statistics", converted, test_statistics.SHAPE, small_net.OPTIONS["sgd"])

    def updating(self, **options: Any) -> Bundle:
        """A network of kind update.

        Args:
            options: `base_momentum` and `reset_every` of its layers, and options of the export.
        """
        of_layers = {name: options.pop(name) for name in ("base_momentum", "reset_every") if name in options}
        name = "-".join(("update", *(f"{key}={value}" for key, value in {**of_layers, **options}.items())))
        model = small_net.updating_net(**of_layers)
        return self._once(name, model, small_net.SHAPE, {"optimizer": "sgd", **options})

    def tagger(self) -> Bundle:
        """A network of two inputs, tokens and a mask, and labels of which some don't count."""
        script = self._folder / "tagger.py"
        script.write_text(test_variable_lengths.MODEL, encoding="utf-8")
        config = small_net.ExportConfig(
            name="tagger",
            input=test_variable_lengths.INPUTS,
            loss=(test_variable_lengths.LOSS,),
            engines=("onnxruntime",),
        )
        with small_net.without_verification():
            return export_bundle(load_model(f"{script}:tagger"), self._folder / "tagger", config)[0]

    def _once(self, name: str, model: Any, shape: tuple[int, ...], options: Mapping[str, Any]) -> Bundle:
        if name not in self._made:
            self._folder.mkdir(exist_ok=True)
            config = small_net.ExportConfig(
                name=name, input_shape=shape, input_dtype="float32", engines=("onnxruntime",), **options
            )
            with small_net.without_verification():
                self._made[name] = export_bundle(model, self._folder / name, config)[0]
        return self._made[name]


class DataOf(NamedTuple):
    """Specification of data by an interface alone."""

    interface: Interface


class Place(NamedTuple):
    """Folder of one call, and the one to which paths are relative."""

    folder: Path
    root: Path

    def path(self, *names: str) -> str:
        """Path of a file below the folder, relative to the root."""
        return str(self.folder.joinpath(*names).relative_to(self.root))


def _random_floats(seed: int) -> NDArray[np.float32]:
    return np.random.Generator(np.random.SFC64(seed)).random(7, dtype=np.float32)


def _rates(given: Mapping[str, Any], *, round: int) -> dict[str, Any]:
    config, steps = TrainConfig(epochs=4, **given), 12
    rates = [learning_rate_at(config, step=step, steps=steps, epochs=4, round=round) for step in range(steps)]
    return {
        "settings": {"epochs": 4, **given},
        "steps": steps,
        "round": round,
        "rates": rates,
        "sum": sum_learning_rates(config, steps=steps, round=round),
    }


def _data(root: Path) -> Iterator[dict[str, Any]]:
    """Files of examples, with labels of all sorts: the labels that a device makes of them, or a refusal."""
    (root / "data").mkdir()
    for number, (loss, names, arrays) in enumerate(DATA):
        path = root / "data" / f"{number}.npz"
        np.savez(path, **{"x": np.zeros((len(arrays["y"]), 2), np.float32), **arrays})
        classes = None if loss == "bce" else 3
        y = ArraySpec("y", (), "float32" if classes is None else "int64", classes, names)
        head = Head(ArraySpec("output", (3,), "float32"), y, find_loss(loss))
        spec = DataOf(Interface(inputs=(ArraySpec("x", (2,), "float32"),), heads=(head,)))
        try:
            labels = open_data(path, spec).labels(np.arange(len(arrays["y"])))["y"].tolist()
        except InputError:
            labels = None
        yield {"data": f"data/{number}.npz", "interface": spec.interface.to_json(), "labels": labels}


def _codecs(root: Path) -> Iterator[dict[str, Any]]:
    """Changes through every codec: with a seed, rounded at random; without, to the nearest."""
    (root / "codecs").mkdir()
    layout = Layout((), (*encoded.tensors(*encoded.SIZES), small_round.tensor("a", (9,), part="variance")))
    weights = Weights(small_round.FINGERPRINT, 3, layout, small_round.random_tensors(layout, 1))
    entries = layout.shared_parameters
    named = encoded.changes(entries)
    for name in CHANGES:
        named[name].tofile(root / "codecs" / name)
        change = _by_name(layout, named[name])
        for codec in CODECS:
            for seed in (None, 7) if find_encoder(codec).unbiased else (None,):
                place = Place(root / "codecs" / f"{name}-{codec.replace(':', '-')}-{seed}", root)
                place.folder.mkdir()
                vector = {
                    "codec": codec,
                    "seed": seed,
                    "tensors": layout.to_json()["tensors"],
                    "change": f"codecs/{name}",
                }
                try:
                    decoded = write_update(
                        place.folder / "update.safetensors",
                        small_round.header(weights, client="é ☃"),
                        layout,
                        change,
                        encoder=find_encoder(codec),
                        seed=seed,
                    )
                except DivergedError:
                    yield {**vector, "update": None}
                    continue
                _flat(layout, decoded).tofile(place.folder / "decoded")
                yield {**vector, "update": place.path("update.safetensors"), "decoded": place.path("decoded")}


def _by_name(layout: Layout, flat: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    found, position = {}, 0
    for tensor in in_order(layout.shared):
        found[tensor.name] = flat[position : position + tensor.size].reshape(tensor.shape)
        position += tensor.size
    return found


def _flat(layout: Layout, values: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.concatenate([values[tensor.name].reshape(-1) for tensor in in_order(layout.shared)])


def _weights(root: Path, bundles: Bundles) -> Iterator[dict[str, Any]]:
    """Encoded weights, and changes that lead to later ones, one after the other; updates are folded on the way."""
    for made in ("statistics", *UPDATES):
        bundle = bundles.updating(**UPDATES[made]) if made in UPDATES else bundles.normalized()
        place = Place(root / f"weights-{made}", root)
        place.folder.mkdir()
        for codec in ("float32", "int4", "uniform"):
            name = f"round-0-{codec}.safetensors"
            weights = write_weights(place.folder / name, read_weights(bundle.file(WEIGHTS)), find_encoder(codec))
            vector: dict[str, Any] = {
                "bundle": str(bundle.path.relative_to(root)),
                "weights": place.path(name),
                "base": weights.base,
                "changes": [],
                "results": [],
            }
            for number in (2, 4, 6) if made == "statistics" else (1, 2, 3, 4):
                later = replace(weights, round=number, tensors=_moved(weights, seed=number))
                change = f"change-{codec}-{number}.safetensors"
                published = publish_change(place.folder / change, weights, later, find_encoder(codec), residual=None)
                weights = published.weights
                vector["changes"].append(place.path(change))
                vector["results"].append(weights.base)
            whole = f"round-{weights.round}-{codec}.safetensors"
            write_weights(place.folder / whole, weights)
            yield {**vector, "whole": place.path(whole)}
    bundle = bundles.updating(**UPDATES["momentum"], initial_codec="drawn")
    name = str(bundle.file(WEIGHTS).relative_to(root))
    base = read_weights(bundle.file(WEIGHTS)).base
    yield {
        "bundle": str(bundle.path.relative_to(root)),
        "weights": name,
        "base": base,
        "changes": [],
        "results": [],
        "whole": name,
    }


def _moved(weights: Weights, *, seed: int) -> dict[str, NDArray[np.float32]]:
    random, shared = np.random.default_rng(seed), {tensor.name for tensor in weights.layout.shared}
    return {
        name: np.asarray(tensor + 0.01 * np.abs(random.standard_normal(tensor.shape)), np.float32)
        if name in shared
        else tensor
        for name, tensor in weights.tensors.items()
    }


def _calls(root: Path, bundles: Bundles) -> Iterator[dict[str, Any]]:
    (root / "calls").mkdir()
    for name, given in STATEFUL.items():
        bundle = bundles.updating(**UPDATES["slow"]) if name == "update" else bundles.small(OPTIMIZERS.get(name, "sgd"))
        place = Place(root / "calls" / name, root)
        place.folder.mkdir()
        weights = read_weights(bundle.file(WEIGHTS))
        _train(bundle, place, bundle.file(WEIGHTS), given, "first.safetensors", keeps=True)
        shutil.copy(place.folder / "state" / "lasting.safetensors", place.folder / "before.safetensors")
        later = weights.moved(_moved(weights, seed=len(name)), 1)
        write_weights(place.folder / "round-1.safetensors", later)
        control = _write_control(place, later) if given.get("algorithm") == "scaffold" else None
        _train(
            bundle,
            place,
            place.folder / "round-1.safetensors",
            given,
            "update.safetensors",
            keeps=True,
            control=control,
        )
        yield {
            **_call(name, bundle, place, given),
            "weights": place.path("round-1.safetensors"),
            "before": place.path("before.safetensors"),
            "after": place.path("state", "lasting.safetensors"),
            **({} if control is None else {"control": place.path(control)}),
        }
    for name, given in STATELESS.items():
        of_name = {"tagger": bundles.tagger, "updates": partial(bundles.updating, **UPDATES["momentum"])}
        bundle = of_name.get(name, bundles.normalized)()
        place = Place(root / "calls" / name, root)
        place.folder.mkdir()
        _train(bundle, place, bundle.file(WEIGHTS), given, "update.safetensors", keeps=False)
        yield {**_call(name, bundle, place, given), "weights": str(bundle.file(WEIGHTS).relative_to(root))}


def _refusals(root: Path, bundles: Bundles) -> Iterator[dict[str, Any]]:
    """Calls with algorithms that keep something of factors whose directions are gone in the next round."""
    bundle = bundles.updating(**UPDATES["momentum"])
    for algorithm in ("scaffold", "feddyn:alpha=0.1"):
        place = Place(root / "calls" / "updates", root)
        weights = str(bundle.file(WEIGHTS).relative_to(root))
        yield {**_call(algorithm, bundle, place, {"algorithm": algorithm}), "weights": weights}


def _signatures(root: Path) -> Iterator[dict[str, Any]]:
    """Envelopes of updates of the calls."""
    (root / "signatures").mkdir()
    for number, (secret, run) in enumerate(product(RFC_8032, RUNS)):
        update = Path("calls", ("sgd", "statistics")[number % 2], "update.safetensors")
        signer = CryptoSigner(Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret)))
        output = root / "signatures" / f"{number}.safetensors"
        write_envelope(root / update, output, signer, run)
        yield {
            "secret": secret,
            "public": public_text(signer.public_key),
            "update": str(update),
            "run": run,
            "envelope": json.loads(envelope_path(output).read_text(encoding="ascii")),
        }


def _call(name: str, bundle: Bundle, place: Place, given: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "bundle": str(bundle.path.relative_to(place.root)),
        "data": place.path("data.npz"),
        "client": f"device {name}",
        "settings": dict(given),
        "update": place.path("update.safetensors"),
    }


def _train(
    bundle: Bundle,
    place: Place,
    weights: Path,
    given: Mapping[str, Any],
    output: str,
    *,
    keeps: bool,
    control: str | None = None,
) -> None:
    data, config = place.folder / "data.npz", {name: given[name] for name in given.keys() - {"codec"}}
    write_data(data, bundle)
    train(
        open_engine(bundle, "onnxruntime", threads=1),
        open_data(data, bundle.manifest),
        weights,
        TrainConfig(**config),
        output=place.folder / output,
        encoder=find_encoder(given["codec"]),
        state=place.folder / "state" if keeps else None,
        client=f"device {place.folder.name}",
        server_state=None if control is None else place.folder / control,
    )


def write_data(path: Path, bundle: Bundle) -> None:
    """Write random examples for a bundle, deflated or not."""
    random = np.random.default_rng(zlib.crc32(path.parent.name.encode()))
    arrays = {spec.name: _draw(random, spec) for spec in (*bundle.interface.inputs, *bundle.interface.labels)}
    for head in bundle.interface.heads:
        if head.loss.ignored is not None:
            arrays[head.label.name][:, -2:] = head.loss.ignored
    save = np.savez if len(path.parent.name) % 2 else np.savez_compressed
    save(path, **arrays)


def _draw(random: np.random.Generator, spec: ArraySpec) -> NDArray[Any]:
    shape = (EXAMPLES, *spec.shape)
    if spec.dtype == "float32":
        return random.standard_normal(shape, dtype=np.float32)
    return random.integers(0, spec.classes or 2, shape).astype(spec.dtype)


def _write_control(place: Place, weights: Weights) -> str:
    random = np.random.default_rng(2)
    control = {
        name: (0.01 * random.standard_normal(tensor.shape)).astype(np.float32)
        for name, tensor in weights.tensors.items()
    }
    state = ServerState(
        fingerprint=weights.fingerprint,
        round=weights.round,
        base=weights.base,
        algorithm="scaffold",
        options={"clients": 10, "lr": 1.0},
        groups={"control": control},
    )
    write_server_state(place.folder / "control.safetensors", state)
    return "control.safetensors"


if __name__ == "__main__":
    write_vectors(Path(sys.argv[1]))
