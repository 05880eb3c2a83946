"""Partials: whatever the shape of their tree, they lead to the weights of a single pass, to the last bit."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from small_round import LAYERS, forge, layout_of, random_tensors, send, start_round, tensor

from fedpara_edge.aggregation import AggregateConfig, Aggregation, Round, aggregate, run_round
from fedpara_edge.aggregation.partials import make_partial
from fedpara_edge.algorithms import SERVER
from fedpara_edge.errors import FedparaError, InputError, InvalidUpdateError, OutputExistsError, TooFewUpdatesError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.weights import Weights, read_weights
from fedpara_edge.storage.digest import content_digest, with_digest
from fedpara_edge.storage.tensorfile import TensorFile
from fedpara_edge.trust.clients import Clients
from fedpara_edge.trust.signatures import IdentityGate

_STATISTICS = tuple(tensor(f"bn.{part}", (3,), "bn", part) for part in ("mean", "variance"))
LAYOUT = Layout(LAYERS, (*layout_of(*LAYERS).tensors, *_STATISTICS))
EXACT = AggregateConfig(exact=True)
METRICS = {"learning_rate_sum": 0.4, "alpha": 0.1}
ALGORITHMS = {name: f"{name}:clients=30" if name in ("scaffold", "feddyn") else name for name in SERVER}


def unit_change(client: str) -> dict[str, NDArray[np.float32]]:
    """A random change whose tensors have norm 1, so that no bound on norms binds it."""
    change = random_tensors(LAYOUT, int.from_bytes(client.encode(), "little"))
    return {name: np.asarray(value / np.linalg.norm(value), np.float32) for name, value in change.items()}


class Fleet:
    """Updates of a round in a folder, of several codecs, with two that bounds bind if asked for."""

    def __init__(self, folder: Path, count: int, *, outliers: bool = False, number: int = 0) -> None:
        self.folder, self.base = folder, folder / "base.safetensors"
        self.weights = start_round(folder, LAYOUT, number=number)
        self.updates = [self.send(f"c{k}", examples=10 + k, codec=("float32", "int4")[k % 2]) for k in range(count)]
        if outliers:
            large = {name: 50 * value for name, value in random_tensors(LAYOUT, 3, 0.1).items()}
            self.bound = [self.send("large", change=large), self.send("greedy", examples=1 << 40)]
            self.updates += self.bound

    def send(self, client: str, **changed: Any) -> Path:
        metrics = {**METRICS, "learning_rate_sum": 0.3 + len(client) / 10}
        return send(self.folder, self.weights, client, **{"metrics": metrics, "change": unit_change(client), **changed})

    def part(self, name: str, files: Sequence[Path], config: AggregateConfig = EXACT, **options: Any) -> Path:
        return make_partial(files, self.base, self.folder / name, config, **options).output

    def tree(self, seed: Any, config: AggregateConfig = EXACT) -> list[Path]:
        """A forest of partials and loose updates, of random shape, over all updates."""
        dice, files = random.Random(seed), list(self.updates)
        dice.shuffle(files)
        for step in range(dice.randrange(1, 2 * len(files))):
            taken = [files.pop() for _ in range(dice.randrange(1, min(5, len(files)) + 1))]
            files.insert(dice.randrange(len(files) + 1), self.part(f"part-{seed}-{step}", taken, config))
        return files

    def finalize(self, name: str, files: Sequence[Path], config: AggregateConfig = EXACT, **options: Any) -> Round:
        return run_round(files, self.base, self.folder / name, config, **options)


def tensors_of(result: Aggregation) -> dict[str, bytes]:
    groups = {} if result.state is None else result.state.groups
    found = {"weights": result.weights.tensors, **groups}
    return {f"{group}/{name}": value.tobytes() for group, each in found.items() for name, value in each.items()}


def facts_of(result: Aggregation) -> list[tuple[Any, ...]]:
    return [
        (each.client, each.examples, each.steps, each.bytes, each.share, each.norm, each.norm_in_medians, each.scale)
        for each in result.accepted
    ]


@settings(max_examples=12)
@given(count=st.integers(1, 9), seed=st.integers(0, 1 << 30))
def test_a_tree_of_any_shape_is_the_single_pass(count: int, seed: int) -> None:
    with TemporaryDirectory() as name:
        fleet = Fleet(Path(name), count)
        single = aggregate(fleet.updates, fleet.weights, exact=True)
        tree = aggregate(fleet.tree(seed), fleet.weights, exact=True)
        assert tree.weights.base == single.weights.base
        assert facts_of(tree) == facts_of(single)
        assert not tree.rejected


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_every_algorithm_goes_on_from_a_tree_as_from_the_updates(name: str, weighting: Any, tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, 7, outliers=True)
    config = AggregateConfig(exact=True, algorithm=ALGORITHMS[name], weighting=weighting)
    options = {"algorithm": config.server_algorithm, "weighting": weighting, "exact": True}
    single = aggregate(fleet.updates, fleet.weights, **options)
    tree = aggregate([*fleet.tree(name, config), *fleet.bound], fleet.weights, **options)
    assert any(each.bounded for each in single.accepted)
    assert tensors_of(tree) == tensors_of(single)
    assert facts_of(tree) == facts_of(single)


def test_the_same_updates_make_the_same_partial_by_any_way(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, 6)
    whole = fleet.part("whole", fleet.updates)
    halves = [fleet.part("one", fleet.updates[:2]), fleet.part("other", fleet.updates[2:])]
    assert fleet.part("merged", halves).read_bytes() == whole.read_bytes()
    assert fleet.part("mixed", [*fleet.updates[2:], halves[0]]).read_bytes() == whole.read_bytes()
    fleet.part("merged", halves)  # done again, as after a kill
    with pytest.raises(OutputExistsError):
        fleet.part("merged", halves[:1])


def test_a_round_from_partials_writes_the_files_of_a_single_pass(tmp_path: Path) -> None:
    """Weights, server state, and the change of a downlink with what it leaves to send, over two rounds."""
    done = {}
    for kind in ("single", "tree"):
        (folder := tmp_path / kind).mkdir()
        fleet = Fleet(folder, 5)
        config = AggregateConfig(exact=True, algorithm="fedadam:lr=0.1", downlink_codec="int4")
        for number in (1, 2):
            files = fleet.updates if kind == "single" else fleet.tree(number, config)
            output = f"w{number}"
            fleet.finalize(output, files, config, state=folder / "server", change=folder / f"change-{number}")
            fleet.base = folder / output
            fleet.weights = read_weights(fleet.base)
            fleet.updates = [fleet.send(f"r{k}", examples=3 + k) for k in range(4)]
        names = ("w1", "w2", "change-1", "change-2", "server/round-1.safetensors", "server/round-2.safetensors")
        done[kind] = [(folder / name).read_bytes() for name in names]
    assert done["tree"] == done["single"]


class TestCountedOnce:
    def test_a_partial_and_the_whole_it_went_into(self, tmp_path: Path) -> None:
        fleet = Fleet(tmp_path, 6)
        part = fleet.part("part", fleet.updates[:3])
        whole = fleet.part("whole", [part, *fleet.updates[3:]])
        copy = tmp_path / "copy"
        copy.write_bytes(part.read_bytes())
        result = aggregate([part, whole, copy, whole], fleet.weights, exact=True)
        assert result.weights.base == aggregate(fleet.updates, fleet.weights, exact=True).weights.base
        assert [(each.path.name, each.code) for each in result.rejected] == [
            ("copy", "duplicate"),
            ("part", "duplicate"),
        ]

    def test_an_update_beside_the_partial_that_has_it(self, tmp_path: Path) -> None:
        fleet = Fleet(tmp_path, 4)
        part = fleet.part("part", fleet.updates[:3])
        result = aggregate([part, *fleet.updates], fleet.weights, exact=True)
        assert result.weights.base == aggregate(fleet.updates, fleet.weights, exact=True).weights.base

    def test_an_update_in_two_partials_needs_its_file(self, tmp_path: Path) -> None:
        fleet = Fleet(tmp_path, 5)
        parts = [fleet.part("one", fleet.updates[:3]), fleet.part("other", fleet.updates[2:])]
        with pytest.raises(InputError, match="the updates of clients 'c2' beside the partials, as they are in several"):
            aggregate(parts, fleet.weights, exact=True)
        result = aggregate([*parts, fleet.updates[2]], fleet.weights, exact=True)
        assert result.weights.base == aggregate(fleet.updates, fleet.weights, exact=True).weights.base
        merged = fleet.part("merged", [*parts, fleet.updates[2]])
        assert merged.read_bytes() == fleet.part("whole", fleet.updates).read_bytes()

    def test_of_a_client_with_several_updates_none_counts_in_any_order(self, tmp_path: Path) -> None:
        fleet = Fleet(tmp_path, 4)
        first, second, third = (
            send(tmp_path, fleet.weights, "twice", name=f"t{k}", change=random_tensors(LAYOUT, k, 0.1))
            for k in range(3)
        )
        expected = aggregate(fleet.updates, fleet.weights, exact=True)
        leaf = fleet.part("leaf", [*fleet.updates[:2], first, second])
        other = fleet.part("other", [*fleet.updates[2:], third])
        with pytest.raises(InputError, match="'twice' beside the partials, as their clients sent several"):
            aggregate([leaf, other], fleet.weights, exact=True)
        merged = fleet.part("merged", [leaf, other, third])
        for files in ([leaf, other, third], [merged], [merged, first]):
            assert aggregate(files, fleet.weights, exact=True).weights.base == expected.weights.base
        assert fleet.part("whole", [*fleet.updates, first, second, third]).read_bytes() == merged.read_bytes()

    def test_a_bad_update_does_not_push_a_good_one_out(self, tmp_path: Path) -> None:
        fleet = Fleet(tmp_path, 3)
        nan = {name: np.full_like(value, np.nan) for name, value in random_tensors(LAYOUT, 1).items()}
        bad = forge(tmp_path / "bad", fleet.weights, tensors=nan, client="c1", metrics=METRICS)
        part = fleet.part("part", fleet.updates[:2])
        result = aggregate([part, bad, fleet.updates[2]], fleet.weights, exact=True)
        assert result.weights.base == aggregate(fleet.updates, fleet.weights, exact=True).weights.base
        assert [each.code for each in result.rejected] == ["not_finite"]


class TestBounds:
    def test_what_a_bound_binds_needs_its_file(self, tmp_path: Path) -> None:
        fleet = Fleet(tmp_path, 5, outliers=True)
        tree = [fleet.part("one", fleet.updates[:4]), fleet.part("other", fleet.updates[4:])]
        with pytest.raises(InputError, match=r"clients 'greedy', 'large' beside .* as a bound binds them"):
            aggregate(tree, fleet.weights, exact=True)
        single = aggregate(fleet.updates, fleet.weights, exact=True)
        assert aggregate([*tree, *fleet.bound], fleet.weights, exact=True).weights.base == single.weights.base

    def test_without_the_bounds_the_partials_are_enough(self, tmp_path: Path) -> None:
        fleet = Fleet(tmp_path, 5, outliers=True)
        bounds = AggregateConfig(unbounded=("norm", "examples", "share")).bounds
        tree = aggregate(fleet.tree(1), fleet.weights, exact=True, bounds=bounds)
        single = aggregate(fleet.updates, fleet.weights, exact=True, bounds=bounds)
        assert tree.weights.base == single.weights.base

    def test_a_rate_out_of_line_is_refused_at_the_end(self, tmp_path: Path) -> None:
        fleet = Fleet(tmp_path, 5)
        odd = fleet.send("odd", metrics={"learning_rate_sum": 1e-4})
        config = AggregateConfig(exact=True, algorithm=ALGORITHMS["scaffold"])
        options = {"algorithm": config.server_algorithm, "exact": True}
        tree = [fleet.part("one", [*fleet.updates[:2], odd], config), fleet.part("other", fleet.updates[2:], config)]
        with pytest.raises(InputError, match="'odd' beside the partials"):
            aggregate(tree, fleet.weights, **options)
        single, found = (aggregate([*files, odd], fleet.weights, **options) for files in (fleet.updates, tree))
        assert [each.code for each in single.rejected] == [each.code for each in found.rejected] == ["metrics"]
        assert tensors_of(single) == tensors_of(found)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "key", "found"),
        [
            ({"rule": "krum"}, "rule", "krum"),
            ({"mixing": "nnm"}, "mixing", "nnm"),
            ({"merge": "refit"}, "merge", "refit"),
        ],
    )
    def test_what_needs_all_updates_at_once(self, options: dict[str, Any], key: str, found: str) -> None:
        with pytest.raises(InputError, match=f"in exact sums and partials, found {found}") as caught:
            AggregateConfig(exact=True, **options)
        assert caught.value.key == key

    def test_partials_without_exact_sums(self, tmp_path: Path) -> None:
        fleet = Fleet(tmp_path, 3)
        with pytest.raises(TooFewUpdatesError, match="found fedpara-edge/partial"):
            aggregate([fleet.part("part", fleet.updates)], fleet.weights)

    def test_partials_for_other_weights_or_another_algorithm(self, tmp_path: Path) -> None:
        fleet = Fleet(tmp_path, 3)
        part = fleet.part("part", fleet.updates)
        later = Weights(fleet.weights.fingerprint, 1, fleet.weights.layout, fleet.weights.tensors)
        cases: dict[str, tuple[Weights, dict[str, Any]]] = {
            "wrong_round": (later, {}),
            "wrong_algorithm": (fleet.weights, {"weighting": "equal"}),
        }
        for code, (weights, options) in cases.items():
            with pytest.raises(TooFewUpdatesError) as caught:
                aggregate([part], weights, exact=True, **options)
            assert [each.code for each in caught.value.rejected] == [code]

    def test_partials_where_signed_updates_alone_count(self, tmp_path: Path) -> None:
        fleet = Fleet(tmp_path, 3)
        gate = IdentityGate(Clients(run="winter", members=()))
        with pytest.raises(TooFewUpdatesError, match=r"1 unsigned.*expected a signature in part\.dsse beside it"):
            aggregate([fleet.part("part", fleet.updates)], fleet.weights, exact=True, gate=gate)

    def test_a_bad_partial_stops_nobody_unless_strict(self, tmp_path: Path) -> None:
        fleet = Fleet(tmp_path, 4)
        good, bad = fleet.part("good", fleet.updates[:2]), fleet.part("bad", fleet.updates[2:])
        bad.write_bytes(bad.read_bytes()[:-1])
        result = aggregate([good, bad], fleet.weights, exact=True)
        assert result.weights.base == aggregate(fleet.updates[:2], fleet.weights, exact=True).weights.base
        assert [(each.path, each.code) for each in result.rejected] == [(bad, "truncated")]
        with pytest.raises(InvalidUpdateError):
            aggregate([good, bad], fleet.weights, exact=True, strict=True)


DAMAGE: dict[str, Any] = {
    "another digest": lambda header, _: header.update(digest="0" * 64),
    "no digest": lambda header, _: header.pop("digest"),
    "an unknown field": lambda header, _: header.update(more=1),
    "a level far off": lambda header, _: header["lowest"].update({"mean/0": 1 << 40}),
    "a level that is text": lambda header, _: header["lowest"].update({"mean/0": "0"}),
    "no sum": lambda _, arrays: arrays.pop("mean/0"),
    "a sum of floats": lambda _, arrays: arrays.update({"mean/0": arrays["mean/0"].astype(np.float32)}),
    "a sum of another length": lambda _, arrays: arrays.update({"mean/0": arrays["mean/0"][:, 1:]}),
    "one digit changed": lambda _, arrays: arrays["mean/0"].__setitem__((0, 0), 1),
    "lines that are no JSON": lambda _, arrays: arrays.update(updates=np.full(9, 0xFF, np.uint8)),
    "lines that are no objects": lambda _, arrays: arrays.update(updates=np.frombuffer(b"[]\n", np.uint8)),
}
LINES: dict[str, Any] = {
    "negative examples": {"examples": -1},
    "no name": {"client": ""},
    "a digest that is none": {"sha256": "x"},
    "a norm that is infinite": {"norms": [1e400, 0]},
    "one norm": {"norms": [1]},
    "a field too many": {"more": 1},
    "a size of nothing": {"bytes": 0},
}


def rewritten(path: Path, change: Any) -> Path:
    """A partial with changed content, whose digest is right unless the change says otherwise."""
    with TensorFile(path, format=None, error=FedparaError) as file:
        header = dict(file.header)
    arrays = {name: array.copy() for name, array in load_file(path).items()}
    before = header["digest"]
    change(header, arrays)
    if header.get("digest") == before:
        header = with_digest({k: v for k, v in header.items() if k != "digest"}, content_digest(arrays))
    save_file(arrays, path, metadata={"fedpara_edge": json.dumps(header)})
    return path


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused(damage: str, tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, 3)
    part = fleet.part("part", fleet.updates)
    if damage == "one digit changed":
        content = bytearray(part.read_bytes())
        content[-2000] ^= 1
        part.write_bytes(content)
    else:
        rewritten(part, DAMAGE[damage])
    with pytest.raises(TooFewUpdatesError) as caught:
        aggregate([part], fleet.weights, exact=True)
    expected = "digest" if damage in ("another digest", "one digit changed") else "partial"
    assert [each.code for each in caught.value.rejected] == [expected]
    assert str(part) in str(caught.value)


@pytest.mark.parametrize("name", LINES)
def test_a_bad_entry_of_the_list_is_refused(name: str, tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, 3)

    def change(_: Any, arrays: dict[str, Any]) -> None:
        first, *rest = arrays["updates"].tobytes().decode().splitlines()
        lines = [json.dumps({**json.loads(first), **LINES[name]}), *rest]
        arrays["updates"] = np.frombuffer("\n".join(lines).encode(), np.uint8)

    part = rewritten(fleet.part("part", fleet.updates), change)
    with pytest.raises(TooFewUpdatesError) as caught:
        aggregate([part], fleet.weights, exact=True)
    assert [each.code for each in caught.value.rejected] == ["partial"]


def test_a_partial_that_says_something_else_than_the_update(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, 3)

    def change(_: Any, arrays: dict[str, Any]) -> None:
        text = arrays["updates"].tobytes().decode().replace('"examples":10,', '"examples":99,')
        arrays["updates"] = np.frombuffer(text.encode(), np.uint8)

    part = rewritten(fleet.part("part", fleet.updates), change)
    with pytest.raises(InvalidUpdateError, match=r"client 'c0': expected what .* says of its update"):
        aggregate([part, fleet.updates[0]], fleet.weights, exact=True)
