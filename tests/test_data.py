"""Data files: what fits is read as it is, what does not is refused in one line, and only what is needed is read."""

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from softmax_regression import make_manifest

from device_runtime.batches import batches_per_epoch, epoch_batches, epoch_order, ordered_batches
from device_runtime.data import open_data
from fedpara_edge.errors import InputError
from fedpara_edge.formats.interface import ArraySpec

CLASSES = make_manifest()
PIXELS = make_manifest(dtype="uint8")
BINARY = make_manifest(loss="bce", y=(2,))
TARGETS = make_manifest(loss="mse", y=(2,))

X = np.arange(28, dtype=np.float32).reshape(7, 4)
Y = np.arange(7) % 3


def save(folder, kind, **arrays):
    """Write arrays as one .npz or as a folder of .npy files."""
    path = folder / f"data-{kind}"
    if kind == "npz":
        np.savez(path.with_suffix(".npz"), **arrays)
        return path.with_suffix(".npz")
    path.mkdir()
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)
    return path


def arrays(batch):
    """Inputs and labels of a batch."""
    x, y = batch
    return x["x"], y["y"]


def taking(spec):
    """The manifest of a classifier with another input."""
    return replace(CLASSES, interface=replace(CLASSES.interface, inputs=(spec,)))


def refusal(action):
    """The one-line message with which an action is refused."""
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["npz", "folder"])
@pytest.mark.parametrize("integers", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4"])
def test_rows_are_those_of_the_file(tmp_path, kind, integers):
    dataset = open_data(save(tmp_path, kind, x=X, y=Y.astype(integers)), CLASSES)
    x, y = arrays(dataset.rows(np.array([5, 0, 3])))
    np.testing.assert_array_equal(x, X[[5, 0, 3]])
    np.testing.assert_array_equal(y, Y[[5, 0, 3]])
    assert (x.dtype, y.dtype) == (np.float32, np.int64)
    assert dataset.examples == 7


@pytest.mark.parametrize("array", [np.asfortranarray(X), X.astype(">f4")], ids=["Fortran order", "big-endian"])
@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_batches_are_native_and_in_c_order(tmp_path, kind, array):
    x, _ = arrays(open_data(save(tmp_path, kind, x=array, y=Y), CLASSES).rows(np.array([2, 1])))
    np.testing.assert_array_equal(x, X[[2, 1]])
    assert x.flags.c_contiguous
    assert x.dtype.isnative


def test_tokens_are_integers_in_their_range(tmp_path):
    manifest = taking(ArraySpec("x", (4,), "int64", classes=28))
    tokens = X.astype(np.uint8)
    x, _ = arrays(open_data(save(tmp_path, "folder", x=tokens, y=Y), manifest).rows(np.array([6])))
    np.testing.assert_array_equal(x, tokens[[6]].astype(np.int64), strict=True)
    short = taking(ArraySpec("x", (4,), "int64", classes=27))
    path = save(tmp_path, "npz", x=tokens, y=Y)
    assert "array 'x', row 6: expected integers in [0, 27), found 27" in refusal(lambda: open_data(path, short))
    path = save(tmp_path, "npz", x=X, y=Y)
    assert "array 'x': expected integers, found float32" in refusal(lambda: open_data(path, manifest))


def test_rows_are_copies(tmp_path):
    dataset = open_data(save(tmp_path, "npz", x=X, y=Y), CLASSES)
    rows = np.arange(7)
    for array in arrays(dataset.rows(rows)):
        array[...] = 0
    x, y = arrays(dataset.rows(rows))
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)


@pytest.mark.parametrize("manifest", [BINARY, TARGETS], ids=["bce", "mse"])
def test_float_labels_have_the_shape_of_the_bundle(tmp_path, manifest):
    labels = np.linspace(0, 1, 14, dtype=np.float32).reshape(7, 2)
    _, y = arrays(open_data(save(tmp_path, "npz", x=X, y=labels), manifest).rows(np.array([6])))
    np.testing.assert_array_equal(y, labels[[6]])


def with_value(array, index, value):
    changed = array.copy()
    changed[index] = value
    return changed


REFUSED = {
    "names": (CLASSES, {"images": X, "y": Y}, "expected arrays named 'x' and 'y', found 'images', 'y'"),
    "no arrays": (CLASSES, {}, "found none"),
    "shape": (CLASSES, {"x": X[:, :3], "y": Y}, "array 'x': expected shape [N, 4], found [7, 3]; bring"),
    "no axis": (CLASSES, {"x": np.float32(1), "y": Y}, "array 'x': expected shape [N, 4], found []"),
    "column of labels": (CLASSES, {"x": X, "y": Y[:, None]}, "array 'y': expected shape [N], found [7, 1]"),
    "float64": (CLASSES, {"x": X.astype(float), "y": Y}, "expected float32, found float64; convert it with x.astype("),
    "uint8": (CLASSES, {"x": X.astype(np.uint8), "y": Y}, "export the bundle again with --input-dtype uint8"),
    "not uint8": (PIXELS, {"x": X, "y": Y}, "export the bundle again with --input-dtype float32"),
    "objects": (CLASSES, {"x": X.astype(object), "y": Y}, "not as objects"),
    "rows": (CLASSES, {"x": X, "y": Y[:6]}, "expected as many rows in 'x' as in 'y', found 7 and 6"),
    "no rows": (CLASSES, {"x": X[:0], "y": Y[:0]}, "expected at least one row, found none"),
    "float classes": (CLASSES, {"x": X, "y": Y.astype(np.float32)}, "array 'y': expected integers, found float32"),
    "truth values": (CLASSES, {"x": X, "y": Y == 1}, "array 'y': expected integers, found bool"),
    "class": (CLASSES, {"x": X, "y": with_value(Y, 5, 3)}, "array 'y', row 5: expected integers in [0, 3), found 3"),
    "negative": (CLASSES, {"x": X, "y": with_value(Y, 2, -1)}, "row 2: expected integers in [0, 3), found -1"),
    "from 1": (
        CLASSES,
        {"x": X, "y": Y + 1},
        "expected labels from 0 to 2, found labels from 1 to 3; subtract 1 from all",
    ),
    "1 and 3 only": (CLASSES, {"x": X, "y": np.where(Y, 3, 1)}, "row 1: expected integers in [0, 3), found 3; correct"),
    "text": (
        CLASSES,
        {"x": X, "y": np.array(["cat", "dog", "owl"])[Y]},
        "array 'y': expected integers, found text; number the classes from 0.*{'cat': 0, 'dog': 1, 'owl': 2}",
    ),
    "huge": (CLASSES, {"x": X, "y": with_value(Y.astype(np.uint64), 2, 1 << 63)}, f"row 2: .*found {1 << 63}"),
    "integer targets": (TARGETS, {"x": X, "y": np.ones((7, 2), int)}, "expected float32, found int64; convert it"),
}


@pytest.mark.parametrize("kind", ["npz", "folder"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path, kind, case):
    manifest, arrays, expected = REFUSED[case]
    path = save(tmp_path, kind, **arrays)
    message = refusal(lambda: open_data(path, manifest))
    assert str(path) in message
    assert all(part in message for part in expected.split(".*"))


BAD_VALUES = {
    "nan": (
        CLASSES,
        {"x": with_value(X, (4, 1), np.nan), "y": Y},
        "array 'x', row 4: expected finite numbers, found nan",
    ),
    "inf": (CLASSES, {"x": with_value(X, (0, 0), -np.inf), "y": Y}, "row 0: expected finite numbers, found -inf"),
    "target": (
        TARGETS,
        {"x": X, "y": with_value(np.zeros((7, 2), np.float32), (3, 1), np.nan)},
        "array 'y', row 3: expected finite numbers, found nan",
    ),
    "binary": (
        BINARY,
        {"x": X, "y": with_value(np.zeros((7, 2), np.float32), (6, 0), 1.5)},
        "array 'y', row 6: expected numbers in [0, 1], found 1.5",
    ),
    "binary nan": (
        BINARY,
        {"x": X, "y": with_value(np.zeros((7, 2), np.float32), (6, 0), np.nan)},
        "array 'y', row 6: expected numbers in [0, 1], found nan",
    ),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values_in_memory_are_refused_at_once(tmp_path, case):
    manifest, arrays, expected = BAD_VALUES[case]
    path = save(tmp_path, "npz", **arrays)
    assert expected in refusal(lambda: open_data(path, manifest))


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values_on_disk_are_refused_when_read(tmp_path, case):
    manifest, arrays, expected = BAD_VALUES[case]
    dataset = open_data(save(tmp_path, "folder", **arrays), manifest)
    shuffled = epoch_batches(dataset, batch_size=2, seed=0, epoch=0)
    assert expected in refusal(lambda: list(shuffled))


def test_missing_and_foreign_files_are_refused(tmp_path):
    assert "found nothing" in refusal(lambda: open_data(tmp_path / "none.npz", CLASSES))
    (tmp_path / "data.txt").write_text("1,2,3,4\n")
    assert "found a text file; save it with numpy.savez" in refusal(lambda: open_data(tmp_path / "data.txt", CLASSES))
    (tmp_path / "data.bin").write_bytes(bytes(9))
    assert "found another file; save it" in refusal(lambda: open_data(tmp_path / "data.bin", CLASSES))
    np.save(tmp_path / "x.npy", X)
    assert "found a numpy array (.npy); save" in refusal(lambda: open_data(tmp_path / "x.npy", CLASSES))
    assert "found 'x'" in refusal(lambda: open_data(tmp_path, CLASSES))


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_every_truncation_is_refused(tmp_path, kind):
    path = save(tmp_path, kind, x=X, y=Y)
    file = path if kind == "npz" else path / "x.npy"
    content = file.read_bytes()
    for length in range(0, len(content), 3):
        file.write_bytes(content[:length])
        assert str(file) in refusal(lambda: open_data(path, CLASSES))


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_every_flipped_byte_is_refused_or_harmless(tmp_path, kind):
    path = save(tmp_path, kind, x=X, y=Y)
    file = path if kind == "npz" else path / "x.npy"
    content = file.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 0x15
        file.write_bytes(flipped)
        try:
            rows = [arrays(batch) for batch in ordered_batches(open_data(path, CLASSES), 3)]
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert sum(len(x) for x, _ in rows) == 7


def test_an_epoch_visits_every_row_once():
    for examples, seed, epoch in itertools.product([1, 2, 50, 1000], [0, 1], [0, 1]):
        order = epoch_order(examples, seed=seed, epoch=epoch)
        np.testing.assert_array_equal(np.sort(order), np.arange(examples))


def test_orders_depend_on_seed_and_epoch_alone():
    orders = {(seed, epoch): epoch_order(100, seed=seed, epoch=epoch) for seed in range(4) for epoch in range(4)}
    assert len({order.tobytes() for order in orders.values()}) == 16
    for (seed, epoch), order in orders.items():
        np.testing.assert_array_equal(epoch_order(100, seed=seed, epoch=epoch), order)


def test_orders_are_these():
    # Pinned: the same call must give the same update on every device.
    assert epoch_order(8, seed=1, epoch=0).tolist() == [5, 0, 1, 4, 2, 6, 3, 7]


def test_batches_cover_the_epoch_from_any_of_them_on(tmp_path):
    dataset = open_data(save(tmp_path, "npz", x=X, y=Y), CLASSES)
    whole = [x["x"] for x, _ in epoch_batches(dataset, batch_size=3, seed=0, epoch=0)]
    assert [len(x) for x in whole] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(whole), X[epoch_order(7, seed=0, epoch=0)])
    for first in range(4):
        rest = [x["x"] for x, _ in epoch_batches(dataset, batch_size=3, seed=0, epoch=0, first=first)]
        assert [x.tobytes() for x in rest] == [x.tobytes() for x in whole[first:]]
    dropped = [x["x"] for x, _ in epoch_batches(dataset, batch_size=3, seed=0, epoch=0, drop_last=True)]
    assert [x.tobytes() for x in dropped] == [x.tobytes() for x in whole[:2]]


def test_dropping_the_only_batch_is_refused():
    assert batches_per_epoch(32, 32, drop_last=True) == 1
    assert "expected at least one whole batch of 32 rows, found 31" in refusal(
        lambda: batches_per_epoch(31, 32, drop_last=True)
    )


def test_evaluation_reads_all_rows_in_order(tmp_path):
    dataset = open_data(save(tmp_path, "npz", x=X, y=Y), CLASSES)
    xs, ys = zip(*map(arrays, ordered_batches(dataset, 3)), strict=True)
    np.testing.assert_array_equal(np.concatenate(xs), X)
    np.testing.assert_array_equal(np.concatenate(ys), Y)


def test_digest_tells_datasets_apart_and_not_containers(tmp_path):
    def digest(name, x, y):
        (tmp_path / name).mkdir()
        return open_data(save(tmp_path / name, "npz", x=x, y=y), CLASSES).digest()

    same = digest("a", X, Y)
    assert open_data(save(tmp_path, "folder", x=X, y=Y), CLASSES).digest() == same
    others = [digest(f"x{row}", with_value(X, (row, 0), 99), Y) for row in range(7)]
    others += [digest(f"y{row}", X, with_value(Y, row, (Y[row] + 1) % 3)) for row in range(7)]
    others += [digest("fewer", X[:6], Y[:6]), digest("dtype", X, Y.astype(np.int8))]
    assert len({same, *others}) == 1 + 16


FAR_LARGER = """
import resource, sys
from pathlib import Path
import numpy as np
from softmax_regression import make_manifest
from device_runtime.batches import epoch_batches
from device_runtime.data import open_data

def peak_mebibytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before = peak_mebibytes()
dataset = open_data(Path(sys.argv[1]), make_manifest(x=(3, 224, 224)))
dataset.digest()
for _, (x, y) in zip(range(5), epoch_batches(dataset, batch_size=8, seed=0, epoch=0)):
    assert not x["x"].any() and not y["y"].any()
print(peak_mebibytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files and ru_maxrss in KiB")
def test_inputs_far_larger_than_memory_are_not_loaded(tmp_path):
    for name, dtype, shape in (("x", "<f4", (100_000, 3, 224, 224)), ("y", "|u1", (100_000,))):
        with (tmp_path / f"{name}.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
            file.truncate(file.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize)
    assert (tmp_path / "x.npy").stat().st_size > 60e9
    run = subprocess.run(
        [sys.executable, "-c", FAR_LARGER, str(tmp_path)],
        env={"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 200
