"""From one data file to clients: who gets what, what is held out, and what is refused."""

import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Command

from fedpara_edge.errors import InputError
from fedpara_edge.formats.update import is_valid_client_name
from fedpara_edge.simulation.data.federation import DataPlan, Federation, load_federation
from fedpara_edge.simulation.data.holdout import fewest_rows, hold_out

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"

ROWS = 240
GENERATOR = np.random.default_rng(0)
OWNERS = np.array(["ann", "Bob", "bob", "eve/1", "eve 1"])[GENERATOR.integers(0, 5, ROWS)]
ARRAYS: dict[str, Any] = {
    "x": np.arange(ROWS, dtype=np.float32)[:, None],
    "y": GENERATOR.integers(0, 4, ROWS),
    "owner": OWNERS,
    "event": np.repeat(np.arange(ROWS // 6), 6),
    "x_test": np.arange(1000, 1010, dtype=np.float32)[:, None],
    "y_test": np.arange(10) % 4,
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, **ARRAYS)
    return path


def rows_of(examples: Any) -> list[int]:
    """Rows of the file that examples are, as the inputs count them; their labels are checked on the way."""
    rows = examples.x[:, 0].astype(int)
    np.testing.assert_array_equal(examples.y, ARRAYS["y"][rows])
    return list(rows)


def all_rows(federation: Federation) -> list[int]:
    sides = [side for client in federation.clients for side in (client.train, client.test) if side is not None]
    return sorted(row for side in sides for row in rows_of(side))


def refusal(plan: DataPlan, seed: int = 0) -> str:
    with pytest.raises(InputError) as caught:
        load_federation(plan, seed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


SPLITS: list[dict[str, Any]] = [
    {"split": "iid", "clients": 6},
    {"split": "dirichlet", "clients": 6, "alpha": 0.5},
    {"split": "shards", "clients": 6, "shards": 2},
    {"split": "key", "key": "owner"},
    {"split": "key", "key": "event"},
]


@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize("split", SPLITS, ids=lambda split: "-".join(map(str, split.values())))
def test_every_row_goes_to_one_client_and_one_side(file: Path, split: dict[str, Any], share: float) -> None:
    plan = DataPlan(path=file, **split, test_share=share)
    federation = load_federation(plan, 3)
    assert all_rows(federation) == list(range(ROWS))
    assert federation.test is None
    for client in federation.clients:
        assert rows_of(client.train) == sorted(rows_of(client.train))
        assert (client.test is None) == (share == 0)
        if client.test is not None:
            rows = len(client.train) + len(client.test)
            assert abs(len(client.test) - share * rows) <= 0.5
    again, other = load_federation(plan, 3), load_federation(plan, 4)
    assert [rows_of(c.train) for c in federation.clients] == [rows_of(c.train) for c in again.clients]
    if share or split["split"] != "key":
        assert [rows_of(c.train) for c in federation.clients] != [rows_of(c.train) for c in other.clients]


def test_owners_keep_their_rows_under_names_that_files_and_updates_can_have(file: Path) -> None:
    clients = load_federation(DataPlan(path=file, split="key", key="owner"), 0).clients
    assert {client.name: rows_of(client.train) for client in clients} == {
        name: np.flatnonzero(owner == OWNERS).tolist()
        for name, owner in (
            ("Bob", "Bob"),
            ("ann", "ann"),
            ("bob-2", "bob"),
            ("eve-1", "eve 1"),
            ("eve-1-2", "eve/1"),
        )
    }
    assert len({client.name.casefold() for client in clients}) == len(clients)
    assert all(is_valid_client_name(client.name) for client in clients)


def test_strange_owners_get_names_that_stay_in_their_folder(tmp_path: Path) -> None:
    owners = ["../../x", ".", "", "/", "a" * 300, "\u03bb" * 300, "\n", "..", "~", "-rf"]
    np.savez(tmp_path / "data.npz", x=np.zeros((20, 1), np.float32), y=np.zeros(20, int), owner=np.repeat(owners, 2))
    clients = load_federation(DataPlan(path=tmp_path / "data.npz", split="key", key="owner"), 0).clients
    names = [client.name for client in clients]
    assert len(set(names)) == len(owners)
    for name in names:
        assert Path(name).name == name
        assert name not in ("", ".", "..")
        assert not name.startswith(("-", "."))
        assert len(os.fsencode(name + ".npz")) < 256
        assert is_valid_client_name(name)


@pytest.mark.parametrize("split", SPLITS[:4], ids=lambda split: split["split"])
def test_groups_are_not_divided(file: Path, split: dict[str, Any]) -> None:
    federation = load_federation(DataPlan(path=file, **split, test_share=0.3, group="event"), 0)
    held = 0
    for client in federation.clients:
        assert client.test is not None
        training, test = rows_of(client.train), rows_of(client.test)
        assert training
        assert test
        assert not set(ARRAYS["event"][training]) & set(ARRAYS["event"][test])
        held += len(test)
    assert abs(held - 0.3 * ROWS) < 0.05 * ROWS


def test_a_client_holds_out_the_same_whoever_else_there_is(file: Path) -> None:
    plan = DataPlan(path=file, split="key", key="owner", test_share=0.2, max_examples=40)
    everyone = {c.name: (rows_of(c.train), rows_of(c.test)) for c in load_federation(plan, 5).clients}
    some = load_federation(replace(plan, max_clients=2), 5).clients
    assert len(some) == 2
    for client in some:
        assert (rows_of(client.train), rows_of(client.test)) == everyone[client.name]
    chosen = {tuple(c.name for c in load_federation(replace(plan, max_clients=2), seed).clients) for seed in range(8)}
    assert len(chosen) > 1
    assert all(len(training) + len(test) <= 40 for training, test in everyone.values())
    assert {name for name, _ in everyone.items()} == {"ann", "Bob", "bob-2", "eve-1", "eve-1-2"}


def test_small_owners_are_left_out(file: Path) -> None:
    counts = {owner: int((owner == OWNERS).sum()) for owner in np.unique(OWNERS)}
    least = sorted(counts.values())[2]
    federation = load_federation(DataPlan(path=file, split="key", key="owner", min_examples=least), 0)
    assert len(federation.clients) == sum(count >= least for count in counts.values())
    assert len(federation.clients) + len(federation.left_out) == len(counts)
    assert all(len(client.train) >= least for client in federation.clients)
    message = refusal(DataPlan(path=file, split="key", key="owner", min_examples=100))
    assert "the largest client, " in message
    assert f"expected at least 100 examples to train on, found {max(counts.values())};" in message


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_least_is_what_is_left_to_train_on(file: Path, share: float) -> None:
    plan = DataPlan(path=file, split="dirichlet", clients=4, alpha=1.0, min_examples=20, test_share=share)
    assert all(len(client.train) >= 20 for client in load_federation(plan, 1).clients)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.2, 0.35, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("min_examples", [1, 2, 19, 64])
def test_fewest_rows_are_enough_and_no_fewer_are(min_examples: int, share: float) -> None:
    def left(rows: int) -> int:
        return rows - int(hold_out(np.ones(rows, int), share, np.random.default_rng(0)).sum())

    fewest = fewest_rows(min_examples, share)
    assert left(fewest) >= min_examples
    assert fewest == 2 or left(fewest - 1) < min_examples


def test_too_small_clients_are_refused_by_name(file: Path) -> None:
    plan = DataPlan(path=file, split="iid", clients=10, min_examples=20, test_share=0.2)
    message = refusal(plan)
    assert message.startswith(f"{file}: client 'client-0': expected at least 20 examples to train on, found 19")
    assert load_federation(replace(plan, min_examples=19), 0).clients


def test_an_owner_with_one_row_or_one_group_is_left_out_where_a_test_is_wanted(tmp_path: Path) -> None:
    arrays = {"x": np.zeros((7, 1), np.float32), "y": np.zeros(7, int), "owner": [1, 2, 2, 2, 3, 3, 3]}
    np.savez(tmp_path / "data.npz", **arrays, event=[0, 0, 0, 0, 0, 0, 1])
    plan = DataPlan(path=tmp_path / "data.npz", split="key", key="owner", test_share=0.1)
    alone = load_federation(plan, 0)
    assert ([client.name for client in alone.clients], alone.left_out) == (["2", "3"], ("1",))
    grouped = load_federation(replace(plan, group="event"), 0)
    assert ([client.name for client in grouped.clients], grouped.left_out) == (["3"], ("1", "2"))
    message = refusal(DataPlan(path=tmp_path / "data.npz", clients=1, test_share=0.5, group="owner", min_examples=7))
    assert "client 'client-0': expected at least 7 examples to train on, found " in message


def test_the_common_test_set_is_whole(file: Path) -> None:
    federation = load_federation(DataPlan(path=file, clients=3, test=("x_test", "y_test")), 0)
    assert federation.test is not None
    np.testing.assert_array_equal(federation.test.x, ARRAYS["x_test"])
    np.testing.assert_array_equal(federation.test.y, ARRAYS["y_test"])


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [
        ("uint8", (5, 4), ("uint8", (1, 5, 4))),
        ("uint8", (3, 5, 4), ("uint8", (3, 5, 4))),
        ("uint8", (80,), ("uint8", (80,))),
        ("float16", (100, 6), ("float32", (100, 6))),
        ("float64", (2,), ("float32", (2,))),
        (">f4", (2,), ("float32", (2,))),
        ("int64", (80,), ("int64", (80,))),
    ],
)
@pytest.mark.parametrize("folder", [False, True], ids=["npz", "folder"])
def test_inputs_become_what_bundles_take(tmp_path: Path, dtype: str, shape: Any, expected: Any, folder: bool) -> None:
    arrays = {"x": np.arange(4 * np.prod(shape)).reshape(4, *shape).astype(dtype), "y": np.arange(4)}
    path = tmp_path / ("data" if folder else "data.npz")
    if folder:
        path.mkdir()
        for name, array in arrays.items():
            np.save(path / f"{name}.npy", array)
    else:
        np.savez(path, **arrays)
    (client,) = load_federation(DataPlan(path=path, clients=1), 0).clients
    assert (client.train.x.dtype, client.train.x.shape[1:]) == expected
    assert client.train.x.dtype.isnative
    np.testing.assert_array_equal(client.train.x.ravel(), arrays["x"].ravel())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "writer"}, "split: expected one of iid, dirichlet, shards, key, found 'writer'"),
        ({}, "clients: expected an integer of at least 1, as split is 'iid', found none"),
        ({"split": "key"}, "key: expected the name of an array, as split"),
        ({"split": "dirichlet", "clients": 2}, "alpha: expected a positive number"),
        ({"split": "shards", "clients": 2}, "shards: expected an integer"),
        ({"clients": 2, "alpha": 0.5}, "alpha: expected with split dirichlet, found with iid"),
        (
            {"split": "key", "key": "k", "clients": 3},
            "clients: expected with split iid or dirichlet or shards, found with key",
        ),
        ({"clients": 0}, "clients: expected an integer of at least 1, found 0"),
        ({"clients": True}, "clients"),
        ({"clients": 2.5}, "clients"),
        ({"clients": 2, "min_examples": 0}, "min_examples"),
        ({"clients": 2, "max_clients": -1}, "max_clients"),
        ({"clients": 2, "max_examples": "all"}, "max_examples"),
        ({"split": "dirichlet", "clients": 2, "alpha": 0.0}, "alpha: expected a positive number, found 0.0"),
        ({"split": "dirichlet", "clients": 2, "alpha": float("nan")}, "alpha"),
        ({"clients": 2, "test_share": 1.0}, "test_share: expected a number of at least 0 and below 1, found 1.0"),
        ({"clients": 2, "test_share": -0.1}, "test_share"),
        ({"split": "key", "key": 3}, "key: expected the name of an array, found 3"),
        ({"clients": 2, "group": "g"}, "group: expected with a test_share above 0, found 'g'"),
        ({"clients": 2, "train": ("x",)}, "train: expected the names of two arrays"),
        ({"clients": 2, "test": "xy"}, "test: expected the names of two arrays"),
        ({"clients": 2, "min_examples": 64, "max_examples": 63}, "max_examples: expected at least 64"),
        (
            {"clients": 2, "min_examples": 64, "max_examples": 79, "test_share": 0.2},
            "max_examples: expected at least 80",
        ),
    ],
)
def test_plans_that_can_not_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        DataPlan(path=Path("data.npz"), **options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("change", "plan", "message"),
    [
        ({}, {"key": "writer"}, "data.key: {file}: expected arrays named 'writer', found "),
        ({}, {"group": "day", "test_share": 0.5}, "data.group: {file}: expected arrays named 'day', found "),
        ({}, {"train": ("images", "y")}, "data.train: {file}: expected arrays named 'images' and 'y', found "),
        ({}, {"test": ("x_test", "labels")}, "data.test: {file}: expected arrays named 'x_test' and 'labels', found "),
        ({"y": ARRAYS["y"][1:]}, {}, "{file}: array 'y': expected as many rows as in 'x', 240, found 239"),
        ({"owner": OWNERS[1:]}, {}, "{file}: array 'owner': expected as many rows as in 'x', 240, found 239"),
        ({"owner": np.zeros(ROWS)}, {}, "{file}: array 'owner': expected an integer or a string for each example"),
        ({"owner": np.zeros((ROWS, 2), int)}, {}, "{file}: array 'owner': expected an integer or a string"),
        ({"x": np.full((ROWS, 1), np.nan)}, {}, "{file}: array 'x', row "),
        ({"x": np.full((ROWS, 1), 1e300)}, {}, "{file}: array 'x', row "),
        ({"x": np.array(["a"] * ROWS)}, {}, "{file}: array 'x': expected numbers"),
        ({"x": np.zeros((0, 1)), "y": np.zeros(0)}, {}, "{file}: array 'x': expected at least one row, found none"),
        (
            {"x_test": np.zeros((10, 2))},
            {"test": ("x_test", "y_test")},
            "{file}: array 'x_test': expected rows like those of 'x', [1], found [2]",
        ),
    ],
)
def test_data_that_does_not_fit_is_named(
    tmp_path: Path, change: dict[str, Any], plan: dict[str, Any], message: str
) -> None:
    file = tmp_path / "data.npz"
    np.savez(file, **ARRAYS | change)
    found = refusal(DataPlan(path=file, **{"split": "key", "key": "owner"} | plan))
    assert found.startswith(message.format(file=file))


@pytest.mark.parametrize("split", SPLITS[1:3], ids=lambda split: split["split"])
def test_labels_that_are_no_classes_are_refused_where_classes_decide(tmp_path: Path, split: dict[str, Any]) -> None:
    file = tmp_path / "data.npz"
    for labels in (np.zeros((ROWS, 80), int), np.zeros(ROWS)):
        np.savez(file, x=ARRAYS["x"], y=labels)
        expected = f"{file}: array 'y': expected one integer for each example for {split['split']}, found "
        assert refusal(DataPlan(path=file, **split)).startswith(expected)
        load_federation(DataPlan(path=file, clients=3), 0)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    message = refusal(DataPlan(path=tmp_path / "none.npz", clients=2))
    assert message.startswith("data.path: expected an .npz file or a folder")
    assert "none.npz" in message


def test_split_writes_what_train_takes(file: Path, tmp_path: Path, run: Command) -> None:
    options = ["--split", "key", "--key", "owner", "--test-share", 0.2, "--test", "x_test,y_test", "--min-examples", 35]
    ended = run("split", file, *options, "-o", tmp_path / "out", "--seed", 2, "--json")
    assert ended.code == 0, ended.err
    plan = DataPlan(path=file, split="key", key="owner", test_share=0.2, test=("x_test", "y_test"), min_examples=35)
    federation = load_federation(plan, 2)
    assert federation.left_out
    assert ended.json["left_out"] == list(federation.left_out)
    assert ended.json["test"] == 10
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.npz")}
    sides = ("train", "test")
    assert files == {"test.npz", *(f"{side}/{client.name}.npz" for client in federation.clients for side in sides)}
    for client in federation.clients:
        assert client.test is not None
        for side, examples in (("train", client.train), ("test", client.test)):
            with np.load(tmp_path / "out" / side / f"{client.name}.npz") as written:
                np.testing.assert_array_equal(written["x"], examples.x, strict=True)
                np.testing.assert_array_equal(written["y"], examples.y, strict=True)
            assert ended.json["clients"][client.name][side] == len(examples)


def test_split_says_what_it_wrote_and_replaces_nothing_unasked(file: Path, tmp_path: Path, run: Command) -> None:
    out = tmp_path / "out"
    assert run("split", file, "--clients", 7, "-o", out).out.startswith(
        f"{out}: 7 clients with 34 to 35 examples to train on, 240 in all"
    )
    refused = run("split", file, "--clients", 3, "-o", out)
    assert (refused.code, len(list((out / "train").iterdir()))) == (7, 7)
    assert run("split", file, "--clients", 3, "-o", out, "--overwrite").code == 0
    assert len(list((out / "train").iterdir())) == 3
    assert run("split", file, "--clients", 3, "--train", "x", "-o", tmp_path / "new").code == 2
    failed = run("split", file, "--split", "key", "--key", "nobody", "-o", tmp_path / "new")
    assert failed.code == 2
    assert failed.err.startswith("Error: data.key: ")
    assert not (tmp_path / "new").exists()


def test_devices_of_writers_share_their_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "plans" / "data")
    devices_of = runpy.run_path(str(ROOT / "plans" / "data" / "mnist_by_writer.py"))["devices_of"]
    writer = np.random.Generator(np.random.PCG64(0)).choice(5, 200, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    device = devices_of(writer, 20)
    assert set(device) == set(range(20))
    assert all(len(set(writer[device == each])) == 1 for each in range(20)), "digits of one writer"
    for name in range(5):
        sizes = np.unique(device[writer == name], return_counts=True)[1]
        assert np.ptp(sizes) <= 1, "even shares"
        assert abs(sizes.mean() - 10) <= 5 or len(sizes) == 1, "devices of a writer in proportion to its digits"
    np.testing.assert_array_equal(devices_of(writer, 5), writer, "one a writer")


@pytest.mark.parametrize(
    ("script", "source", "expected"),
    [
        (
            "cifar10.py --train 40 --test 10",
            "cifar10_q75_jpeg_full.npz",
            {"x_train": ("uint8", (40, 3, 32, 32)), "y_train": ("int64", (40,)), "x_test": ("uint8", (10, 3, 32, 32))},
        ),
        (
            "shakespeare.py",
            "shakespeare_roles.npz",
            {"x": ("uint8", (53071, 80)), "y": ("uint8", (53071, 80)), "role": ("<U32", (53071,))},
        ),
        (
            "har_phone.py",
            "har_phone_by_subject.npz",
            {"x": ("float32", (4033, 100, 6)), "y": ("int64", (4033,)), "execution": ("int64", (4033,))},
        ),
        (
            "mnist_by_writer.py",
            "mnist10k_by_writer.npz",
            {"x": ("uint8", (10000, 1, 28, 28)), "writer": ("int64", (10000,)), "device": ("int64", (10000,))},
        ),
    ],
)
def test_scripts_make_the_data_of_the_plans(tmp_path: Path, script: str, source: str, expected: Any) -> None:
    name, *options = script.split()
    command = [sys.executable, ROOT / "plans" / "data" / name, *options, "-o", tmp_path / "data.npz"]
    missing = subprocess.run(
        [*command, "--source", "none.npz"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert missing.returncode == 1
    assert missing.stderr.startswith("Error: none.npz: expected an .npz with ")
    if not (SHARED / source).exists():
        pytest.skip(f"needs {source} in ../shared/data")
    if name == "cifar10.py":
        pytest.importorskip("PIL", reason="needs Pillow, of the extra report")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "data.npz") as data:
        found = {name: (data[name].dtype, data[name].shape) for name in expected}
        assert found == {name: (np.dtype(dtype), shape) for name, (dtype, shape) in expected.items()}
        if name == "shakespeare.py":
            np.testing.assert_array_equal(data["x"][:, 1:], data["y"][:, :-1])
            assert data["x"].max() < 80
