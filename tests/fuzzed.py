"""Every format that is read from elsewhere: files of it, how they are mutated, and what reads them; for `fuzz.py`."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from json import dumps, loads
from pathlib import Path
from random import Random
from typing import Any

import click
import fuzzed_services as services
import numpy as np
import signed
from mutations import Made, Mutate, in_bytes, in_json, in_lines, in_protobuf, in_tensors, in_toml
from onnx import TensorProto, helper
from small_round import layer, layout_of, random_tensors, send, start_round
from softmax_regression import SoftmaxRegression, make_bundle, write_npz
from tiny_plan import write_plan
from written import half_run, partials

from device_runtime.data import open_data
from device_runtime.loading import load_personal
from device_runtime.sources.tables import read_table
from device_runtime.state import PENDING, PROMISE, DeviceState
from device_runtime.statefiles import (
    Committed,
    Progress,
    read_committed,
    read_progress,
    write_committed,
    write_progress,
)
from device_runtime.tuning import Choice, Way, read_choice, write_choice
from fedpara_edge.aggregation import AggregateConfig, aggregate, run_round
from fedpara_edge.cli import fedpara_edge
from fedpara_edge.codecs import find_encoder
from fedpara_edge.errors import TooFewUpdatesError
from fedpara_edge.formats.bundle import INITIAL_PERSONAL, MANIFEST, Bundle, open_bundle
from fedpara_edge.formats.change import apply_change
from fedpara_edge.formats.folded import METADATA_KEY, FoldedSpec, read_folded
from fedpara_edge.formats.serverstate import read_server_state
from fedpara_edge.formats.transcript import read_transcript
from fedpara_edge.formats.weights import read_weights, write_weights
from fedpara_edge.privacy.devices import FILE as SPENT
from fedpara_edge.privacy.devices import Sent, find_device_budget, open_device_ledger
from fedpara_edge.privacy.ledger import FILE, open_privacy_ledger
from fedpara_edge.privacy.ledger import FORMAT as PRIVACY
from fedpara_edge.report.results import read_results
from fedpara_edge.report.rows import read_metrics, to_csv
from fedpara_edge.report.summarizing import summarize
from fedpara_edge.simulation.data.clients import INDEX
from fedpara_edge.simulation.data.clients import read_clients as read_dealt
from fedpara_edge.simulation.growth import check_growth
from fedpara_edge.simulation.metrics import Journal
from fedpara_edge.simulation.plan.plan import read_plan
from fedpara_edge.simulation.runner import _is_finished, _outcome
from fedpara_edge.storage.rounds import round_path
from fedpara_edge.trust.client import receive
from fedpara_edge.trust.clients import read_clients
from fedpara_edge.trust.envelope import Statement, envelope_path, read_envelope, verified_statement, write_envelope
from fedpara_edge.trust.keys import new_key, read_public, read_signer
from fedpara_edge.trust.ledger import open_ledger
from fedpara_edge.trust.publication import Lifetimes
from fedpara_edge.trust.repository import _Publisher
from fedpara_edge.trust.roots import check_root, read_root

EXACT = AggregateConfig(exact=True)
CODECS = ("float32", "float16", "int8", "int4", "uniform", "topk:share=0.2")


@dataclass(frozen=True)
class Format:
    """A format.

    Args:
        make: Function that writes files of the format into a folder; with what reads one of them, when it was mutated.
        mutate: Mutation of a file's content.
        readers: Modules that parse it.
        states: What its header states as its format.
        slow: Number of the others' mutants that cost as much as one of this format.
        message: Whether it comes in a message, and is in a file for the mutation alone.
    """

    make: Callable[[Path], Made]
    mutate: Mutate
    readers: Sequence[str] = ()
    states: Sequence[str] = ()
    slow: int = 1
    message: bool = False


def _updates(folder: Path) -> Made:
    weights = start_round(folder, number=0)

    def read(path: Path) -> None:
        try:
            found = aggregate([path], weights)
        except TooFewUpdatesError as error:
            raise error.rejected[0] from error
        _check_finite(found.weights.tensors)

    return [send(folder, weights, f"c-{number}", codec=codec) for number, codec in enumerate(CODECS)], read


def _weights(folder: Path) -> Made:
    weights = start_round(folder)
    write_weights(folder / "encoded", weights, find_encoder("int8"))
    layout = layout_of(replace(layer("fc", (8, 9), kind="update"), base_momentum=0.5, reset_every=2))
    write_weights(folder / "folded", replace(weights, layout=layout, tensors=random_tensors(layout, 1)))
    paths = [folder / "base.safetensors", folder / "encoded", folder / "folded"]
    return paths, lambda path: _check_finite(read_weights(path).tensors)


def _changes(folder: Path) -> Made:
    weights = start_round(folder, number=0)
    paths = []
    for number, codec in enumerate(CODECS):
        paths.append(folder / f"change-{number}")
        state = folder / f"state-{number}"
        config = AggregateConfig(downlink_codec=codec)
        update = send(folder, weights, "ann")
        run_round([update], folder / "base.safetensors", folder / f"w-{number}", config, state=state, change=paths[-1])
    return paths, lambda path: _check_finite(apply_change(weights, path).tensors)


def _partials(folder: Path) -> Made:
    partials(folder)

    def read(path: Path) -> None:
        files = [path, folder / "ben.partial"]
        _check_finite(
            run_round(
                files, folder / "base.safetensors", folder / "n", EXACT, overwrite=True
            ).aggregation.weights.tensors
        )

    return [folder / "ann.partial"], read


def _server_states(folder: Path) -> Made:
    weights, paths = start_round(folder, number=0), []
    names = {"fedadam": "fedadam:lr=0.1", "feddyn": "feddyn:clients=3"}
    for short, name in names.items():
        state = folder / short
        update = send(folder, weights, "ann", metrics={"loss": 0.5, "alpha": 0.1})
        run_round(
            [update], folder / "base.safetensors", folder / f"w-{short}", AggregateConfig(algorithm=name), state=state
        )
        paths.append(round_path(state, 1))

    def read(path: Path) -> None:
        state = read_server_state(path)
        state.check_weights(read_weights(folder / f"w-{path.parent.name}"))
        state.check_algorithm(AggregateConfig(algorithm=names[path.parent.name]).server_algorithm)
        for group in state.groups.values():
            _check_finite(group)

    return paths, read


def _device_states(folder: Path) -> Made:
    bundle = make_bundle(folder / "bundle")
    engine, fingerprint = SoftmaxRegression(bundle), bundle.manifest.fingerprint
    call = {"round": 1, "base": "b" * 64, "epochs": 2}
    groups = {"personal": {"fc.bias": np.ones(3, np.float32)}, "residual": {"fc.weight": np.ones((3, 4), np.float32)}}
    write_committed(folder / "lasting", Committed(call=call, before=groups, after=groups), fingerprint)
    progress = Progress(
        call=call, output="/x/u", step=3, seconds=1.5, loss_sums=(2.5,), groups={"engine": engine.state()}
    )
    write_progress(folder / "progress", progress, fingerprint)

    def read(path: Path) -> None:
        if path.name == "progress":
            read_progress(path, fingerprint)
            return
        found = read_committed(path, fingerprint).start_of({**call, "round": 2})
        load_personal(engine, found)

    return [folder / "lasting", folder / "progress"], read


def _promises(folder: Path) -> Made:
    bundle = make_bundle(folder / "bundle")
    promise = folder / PROMISE
    text = dumps({"output": str(folder / "u"), "waiting": ".u.abcdefgh"})
    promise.write_text(text)

    def read(_: Path) -> None:
        (folder / PENDING).write_bytes(b"pending")
        DeviceState(folder, bundle.manifest.fingerprint).settle()

    return [promise], read


def _tunings(folder: Path) -> Made:
    ways, of = [Way("default", None), Way("direct", 2)], {"engine": "onnxruntime", "rows": 32}
    write_choice(folder / "tuning", of, Choice(ways[1], {ways[0]: 2.5, ways[1]: 1.25}))

    def read(path: Path) -> None:
        assert read_choice(path, of, ways) in (None, *ways)

    return [folder / "tuning"], read


def _personal(folder: Path) -> Made:
    bundle = make_bundle(folder / "bundle")

    def read(_: Path) -> None:
        found = bundle.read_initial_personal()
        expected = {tensor.name: tensor.shape for tensor in bundle.manifest.layout.with_role("personal")}
        assert {name: tensor.shape for name, tensor in found.items()} == expected
        _check_finite(found)

    return [bundle.file(INITIAL_PERSONAL)], read


def _manifests(folder: Path) -> Made:
    path = make_bundle(folder / "bundle").path

    def read(_: Path) -> None:
        bundle = open_bundle(path)
        assert bundle.interface.inputs
        assert bundle.manifest.layout.dense_parameters >= 0

    return [path / MANIFEST], read


def _in_manifest(content: bytes, random: Random) -> bytes:
    """A manifest with changed fields, and often with the fingerprint of what it states then."""
    mutant = in_json(content, random)
    try:
        data = loads(mutant)
        free = {name: value for name, value in data.items() if name not in ("model", "engines", "files", "fingerprint")}
        text = dumps(free, sort_keys=True, separators=(",", ":"))
        if random.random() < 0.8:
            return dumps({**data, "fingerprint": sha256(text.encode()).hexdigest()}).encode()
    except (ValueError, AttributeError, RecursionError):
        pass
    return mutant


def _model(metadata: Mapping[str, str]) -> bytes:
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 3], [0.5] * 12)
    inner = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["v"])], "inner", [], [helper.make_empty_tensor_value_info("v")]
    )
    nodes = [
        helper.make_node("Constant", [], ["c"], value=helper.make_tensor("k", TensorProto.BOOL, [], [True])),
        helper.make_node("If", ["c"], ["v"], then_branch=inner, else_branch=inner),
        helper.make_node("Gemm", ["x", "v"], ["y"], alpha=1.0, transA=0),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], [weight]), opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )
    helper.set_model_props(model, dict(metadata))
    return bytes(model.SerializeToString())


def _graphs(folder: Path) -> Made:
    bundle = Bundle(folder, make_bundle(folder / "bundle").manifest)
    paths = [folder / name for name in ("train_step.onnx", "training_model.onnx")]
    for path in paths:
        path.write_bytes(_model({}))
    return paths, lambda path: bundle.read_graph(path.name)


def _folded(folder: Path) -> Made:
    manifest = make_bundle(folder / "bundle").manifest
    spec = FoldedSpec(
        model="m", fingerprint=manifest.fingerprint, round=1, precision="float32", personal=False,
        interface=manifest.interface,
    )  # fmt: skip
    (folder / "model.onnx").write_bytes(_model({METADATA_KEY: spec.to_json()}))
    return [folder / "model.onnx"], read_folded


def _plans(folder: Path) -> Made:
    return [write_plan(folder, ("[arms.dense]", '[arms.dense]\naggregate.algorithm = "fedadam:lr=0.1"'))], read_plan


def _configurations(folder: Path) -> Made:
    (folder / "c.toml").write_text(
        '[train]\ndata = "d.npz"\nepochs = 2\nlr = 0.1\ncodec = "int8"\n[aggregate]\nstrict = true\n'
        "[keys.new]\njson = true\n"
    )

    def read(path: Path) -> None:
        with redirect_stdout(io.StringIO()):
            fedpara_edge.main(["--config", str(path), "keys", "--help"], standalone_mode=False)

    return [folder / "c.toml"], read


def _metrics(folder: Path, *, report: bool) -> Made:
    half_run(folder)
    run, plan = folder / "run", read_plan(folder / "plan.toml")

    def read(path: Path) -> None:
        if report:
            summarize(read_results(run))
            to_csv(read_metrics(run), io.StringIO())
        else:
            journal = Journal(path)
            check_growth(run / "plan.toml", folder / "plan.toml", journal.events)
            for arm in plan.arms:
                _is_finished(journal, arm, 4)
                _outcome(journal, plan, arm.name, 4)
            journal.sort([arm.name for arm in plan.arms], plan.seeds)

    return [run / "metrics.jsonl"], read


def _dealt(folder: Path) -> Made:
    half_run(folder)
    dealt = folder / "run" / "work" / ".data" / "seed-4"

    def read(path: Path) -> None:
        found = read_dealt(path.parent)
        for name in found.names:
            assert found.train(name).resolve().relative_to(dealt / "clients").parts == (name, "train")

    return [dealt / INDEX], read


def _ledgers(folder: Path) -> Made:
    weights = start_round(folder, number=0)
    with open_ledger(folder / "ledger", signed.RUN) as ledger:
        digests = {"ann": "a" * 64, "ben": "b" * 64}
        ledger.record(digests, fingerprint=weights.fingerprint, round=0, base=weights.base)

    def read(_: Path) -> None:
        with open_ledger(folder / "ledger", signed.RUN) as ledger:
            assert all(isinstance(text, str) for pair in ledger.accepted(0).items() for text in pair)

    return [folder / "ledger" / "round-0.json"], read


def _budgets(folder: Path) -> Made:
    (folder / FILE).write_text(
        dumps({"format": PRIVACY, "version": 1, "secret": "ab" * 32,
               "spent": [{"round": 1, "noise": 1.5, "sampling": 0.5, "tag": "cd"}]})
    )  # fmt: skip
    (folder / FILE).chmod(0o600)

    def read(_: Path) -> None:
        with open_privacy_ledger(folder, lambda rounds, _: sum(share / noise for noise, share in rounds)) as ledger:
            assert ledger.spent(1e-5) >= 0

    return [folder / FILE], read


def _device_budgets(folder: Path) -> Made:
    budget, sent = find_device_budget("gaussian:epsilon=9,delta=1e-5"), Sent(client="ann", sha256="a" * 64, noise=2.0)
    with open_device_ledger(folder) as ledger:
        ledger.record(budget, [sent, replace(sent, client="ben", noise=30.0)], "b" * 64)

    def read(_: Path) -> None:
        with open_device_ledger(folder) as ledger:
            ledger.check(budget, replace(sent, sha256="c" * 64, noise=1e6), "d" * 64)

    return [folder / SPENT], read


def _transcripts(folder: Path) -> Made:
    weights = start_round(folder, number=0)
    path = folder / "transcript.json"
    run_round([send(folder, weights, "ann")], folder / "base.safetensors", folder / "next", transcript=path)
    return [path], lambda path: read_transcript(path).digests


def _envelopes(folder: Path) -> Made:
    new_key(folder / "ann")
    update = send(folder, start_round(folder), "ann")
    write_envelope(update, update, read_signer(folder / "ann"), signed.RUN)
    key = read_public(folder / "ann.pub")
    return [envelope_path(update)], lambda _: verified_statement(read_envelope(update), key, update, Statement)


def _clients(folder: Path) -> Made:
    path, lines = folder / "clients.toml", [f'run = "{signed.RUN}"']
    for name in ("ann", "ben"):
        lines += [f"[clients.{name}]", f'key = "ed25519:{sha256(name.encode()).hexdigest()}"', "max_examples = 50"]
    path.write_text("\n".join(lines))
    return [path], read_clients


def _roots(folder: Path) -> Made:
    root = signed.first_root(folder, signed.make_keys(folder))

    def read(path: Path) -> None:
        found = read_root(path)
        check_root(path, found, [found.signed])

    return [root], read


def _keys(folder: Path) -> Made:
    new_key(folder / "ann")
    return [folder / "ann", folder / "ann.pub"], lambda path: read_public(path)


def _repositories(folder: Path) -> Made:
    keys = signed.make_keys(folder)
    root = signed.first_root(folder, keys)
    signed.release(folder / "r", root, keys, bundle=make_bundle(folder / "bundle").path)
    metadata = folder / "r" / "metadata"
    count = iter(range(1 << 60))

    def read(_: Path) -> None:
        number = next(count)
        if number % 2:
            _Publisher(folder / "r", root, {}, Lifetimes())
        else:
            receive(str(folder / "r"), root, folder / f"cache-{number}")

    return [path for path in metadata.iterdir() if path.name != "1.root.json"], read


def _npz(folder: Path) -> Made:
    bundle = make_bundle(folder / "bundle")
    return [write_npz(folder / "d.npz")], lambda path: open_data(path, bundle.manifest)


def _tables(folder: Path) -> Made:
    path = folder / "t.csv"
    path.write_text("a,b,label\n" + "".join(f"{n},{n / 7:.3f},{'xyz'[n % 3]}\n" for n in range(30)))
    return [path], read_table


def _check_finite(tensors: Mapping[str, Any]) -> None:
    for name, tensor in tensors.items():
        assert np.isfinite(tensor).all(), name


FORMATS: dict[str, Format] = {
    "update": Format(_updates, in_tensors, ("storage.tensortable", "storage.tensorfile"), ("update",), slow=5),
    "weights": Format(_weights, in_tensors, (), ("weights",)),
    "change": Format(_changes, in_tensors, (), ("change",)),
    "partial": Format(_partials, in_tensors, ("formats.partial",), ("partial",), slow=5),
    "server state": Format(_server_states, in_tensors, (), ("server-state",), slow=2),
    "device state": Format(_device_states, in_tensors, (), ("device-state", "progress")),
    "promise": Format(_promises, in_json, ("state",)),
    "tuning": Format(_tunings, in_json, ("tuning",), ("tuning",)),
    "personal tensors": Format(_personal, in_tensors, (), ("local",)),
    "manifest": Format(_manifests, _in_manifest, ("formats.bundle",)),
    "step graph": Format(_graphs, in_protobuf, ("formats.graphfile",)),
    "folded model": Format(_folded, in_protobuf, ("formats.folded",), ("folded",)),
    "plan": Format(_plans, in_toml, ("simulation.plan.plan",), slow=10),
    "configuration": Format(_configurations, in_toml, ("cli",)),
    "metrics": Format(partial(_metrics, report=False), in_lines, ("simulation.metrics",), slow=5),
    "metrics for a report": Format(partial(_metrics, report=True), in_lines, ("report.results",), slow=10),
    "dealt rows": Format(_dealt, in_json, ("simulation.data.clients",)),
    "ledger": Format(_ledgers, in_json, ("trust.ledger",), ("ledger",)),
    "privacy budget": Format(_budgets, in_json, ("privacy.ledger",), ("privacy",)),
    "budgets of devices": Format(_device_budgets, in_json, ("privacy.devices",), ("device-privacy",)),
    "transcript": Format(_transcripts, in_json, ("formats.transcript",), ("transcript",)),
    "envelope": Format(_envelopes, in_json, ("trust.envelope",)),
    "list of clients": Format(_clients, in_toml, ("trust.clients",)),
    "root metadata": Format(_roots, in_json, ("trust.roots",)),
    "key": Format(_keys, in_bytes, ("trust.keys",)),
    "repository": Format(_repositories, in_json, ("trust.client", "trust.repository"), slow=50),
    "task": Format(services.tasks, in_json, ("formats.task",), ("task",), message=True),
    "state of serve": Format(
        services.serving, in_lines, ("serving.folder", "serving.rounds", "storage.lines"), ("serving",)
    ),
    "upload": Format(services.uploads, in_json, ("serving.uploads",), message=True),
    "address": Format(services.addresses, in_json, ("serving.invitation",)),
    "joining": Format(services.joining, in_json, ("serving.requests",), message=True),
    "member": Format(services.members, in_json, ("agent.member",)),
    "sending": Format(services.sending, in_json, ("agent.transfers",)),
    "listing of a Hub": Format(services.hub_listings, in_json, ("hub.download",), message=True),
    "app of a fleet": Format(services.fleet_apps, in_toml, ("fleet.app",)),
    "call of a fleet": Format(services.fleet_calls, in_json, ("fleet.messages",), message=True),
    "devices of a fleet": Format(services.fleet_devices, in_json, ("fleet.federation",)),
    "npz": Format(_npz, in_bytes, ("storage.arrayfile",)),
    "csv": Format(_tables, in_bytes, ("sources.tables",), slow=2),
}
ALLOWED = (click.ClickException, click.exceptions.Exit)
"""Errors and ends of the command line that are no `FedparaError`, each one line too."""
