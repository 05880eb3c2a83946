"""Files that are made to cost memory: refused at once, and nothing of them is kept."""

import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from small_round import FINGERPRINT, forge, layer, layout_of, send, start_round
from softmax_regression import make_bundle

from fedpara_edge.aggregation import aggregate
from fedpara_edge.aggregation.screening import screen
from fedpara_edge.algorithms.fedavg import FedAvgServer
from fedpara_edge.codecs import find_encoder
from fedpara_edge.errors import DivergedError, FedparaError, InvalidUpdateError, WrongBundleError, detached
from fedpara_edge.formats.bundle import WEIGHTS
from fedpara_edge.formats.change import apply_change
from fedpara_edge.formats.tables import max_table_bytes
from fedpara_edge.formats.weights import Weights, read_weights, write_weights
from fedpara_edge.storage.tensorfile import TensorFile
from fedpara_edge.storage.tensortable import MAX_TABLE_BYTES, MAX_VALUES, strict_json

SIZE = MAX_TABLE_BYTES - (1 << 20)
MIB = 1 << 20


def metadata_of_lists(size: int) -> str:
    inner = '{"format":"fedpara-edge/update","version":1,"x":[' + ",".join(["[]"] * (size // 3)) + "]}"
    return json.dumps({"__metadata__": {"fedpara_edge": inner}}, separators=(",", ":"))


def many_tensors(size: int) -> str:
    rows = ",".join(f'"{k:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for k in range(size // 64))
    return '{"__metadata__":{"fedpara_edge":"{}"},' + rows + "}"


def other_metadata(size: int) -> str:
    return json.dumps({"__metadata__": {"a": "x" * size}})


TABLES: dict[str, Callable[[int], str]] = {
    "metadata of lists": metadata_of_lists,
    "many tensors": many_tensors,
    "other metadata": other_metadata,
}


def write_table(path: Path, table: str) -> Path:
    data = table.encode()
    data += b" " * (-len(data) % 8)
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    return path


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return start_round(tmp_path)


@contextmanager
def bounded(*, peak: float, kept: float) -> Iterator[None]:
    """Memory of Python and numpy, in MiB, at most and afterwards."""
    tracemalloc.start()
    try:
        yield
        now, highest = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert highest < peak * MIB
    assert now < kept * MIB


@pytest.mark.parametrize("kind", TABLES)
def test_a_large_header_is_not_read(kind: str, tmp_path: Path, weights: Weights) -> None:
    path = write_table(tmp_path / "large", TABLES[kind](SIZE))
    start = time.perf_counter()
    with bounded(peak=1, kept=0.1):
        _, (rejected,) = screen([path], weights, FedAvgServer())
    assert time.perf_counter() - start < 1  # 0.1 s where nothing else runs
    assert rejected.code == "not_safetensors"
    assert f"where {max_table_bytes(weights.layout)} are enough" in rejected.reason


@pytest.mark.slow
@pytest.mark.parametrize("kind", TABLES)
def test_refused_updates_leave_nothing_behind(kind: str, tmp_path: Path, weights: Weights) -> None:
    table = TABLES[kind](max_table_bytes(weights.layout) - 200)
    paths = [write_table(tmp_path / f"{k}", table) for k in range(40)]
    with bounded(peak=20, kept=0.5):
        admitted, rejected = screen(paths, weights, FedAvgServer())
    assert not admitted
    assert len(rejected) == 40


def test_accepted_updates_leave_little_behind(tmp_path: Path, weights: Weights) -> None:
    paths = [send(tmp_path, weights, f"client-{k}", codec="int8") for k in range(100)]
    screen(paths[:2], weights, FedAvgServer())
    with bounded(peak=2, kept=0.01 * len(paths)):
        admitted, _ = screen(paths, weights, FedAvgServer())
    assert len(admitted) == 100


def test_unknown_header_fields_are_refused_by_name(tmp_path: Path, weights: Weights) -> None:
    path = forge(tmp_path / "u", weights, more="x" * 1000)
    _, (rejected,) = screen([path], weights, FedAvgServer())
    assert (rejected.code, rejected.client) == ("header", "mallory")
    assert "expected only header fields of version 1, found 'more' besides" in rejected.reason


def test_metrics_have_short_names(tmp_path: Path, weights: Weights) -> None:
    path = forge(tmp_path / "u", weights, metrics={"m" * 101: 1.0})
    _, (rejected,) = screen([path], weights, FedAvgServer())
    assert "expected a name of at most 100 characters, found one of 101" in rejected.reason


def test_json_of_many_values_is_refused_before_it_is_parsed() -> None:
    text = "[" + ",".join(["[]"] * MAX_VALUES) + "]"
    with bounded(peak=1, kept=0.1), pytest.raises(ValueError, match=f"JSON of more than {MAX_VALUES} values"):
        strict_json(text)


@pytest.mark.parametrize("kind", TABLES)
def test_any_file_of_ours_is_bounded(kind: str, tmp_path: Path) -> None:
    """Files of no known layout, such as a server's state."""
    path = write_table(tmp_path / "large", TABLES[kind](SIZE))
    with bounded(peak=120, kept=0.1):
        try:
            TensorFile(path, format=None, error=WrongBundleError)
        except WrongBundleError as error:
            found = detached(error)
    assert "expected a" in str(found)


@pytest.mark.parametrize("fingerprint", ["of the bundle", FINGERPRINT])
def test_weights_of_another_layout_are_refused_before_they_are_decoded(tmp_path: Path, fingerprint: str) -> None:
    """An encoded weights file may claim 256 entries for each of its bytes."""
    bundle = make_bundle(tmp_path / "bundle")
    large = layout_of(layer("fc", (4096, 4096), kind="dense"))
    tensors = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in large.shared}
    path = tmp_path / "large"
    stated = bundle.manifest.fingerprint if fingerprint == "of the bundle" else fingerprint
    write_weights(path, Weights(stated, 0, large, tensors), find_encoder("topk:share=0.001"))
    assert path.stat().st_size < MIB
    with bounded(peak=3, kept=0.1), pytest.raises(WrongBundleError, match=r"expected weights of bundle .*…, found"):
        read_weights(path, bundle)
    assert read_weights(bundle.file(WEIGHTS), bundle).round == 0


def test_a_change_with_a_large_header_is_not_read(tmp_path: Path, weights: Weights) -> None:
    path = write_table(tmp_path / "large", metadata_of_lists(SIZE))
    with bounded(peak=1, kept=0.1), pytest.raises(InvalidUpdateError, match="are enough"):
        apply_change(weights, path)


def test_an_error_to_keep_holds_no_frames() -> None:
    try:
        try:
            raise ValueError("inner")
        except ValueError as inner:
            raise DivergedError("outer") from inner
    except FedparaError as error:
        kept = detached(error)
    assert (kept.__traceback__, kept.__cause__, kept.__context__, str(kept)) == (None, None, None, "outer")


def test_good_updates_count_beside_hostile_ones(tmp_path: Path, weights: Weights) -> None:
    good = [send(tmp_path, weights, client) for client in "ab"]
    bad = [write_table(tmp_path / kind, make(SIZE)) for kind, make in TABLES.items()]
    result = aggregate([*good, *bad], weights)
    assert [update.client for update in result.accepted] == ["a", "b"]
    assert len(result.rejected) == len(bad)
    assert result.weights.base == aggregate(good, weights).weights.base


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_a_bad_update_under_a_clients_name_does_not_push_its_own_out(
    codec: str, tmp_path: Path, weights: Weights
) -> None:
    good = [send(tmp_path, weights, client, codec=codec) for client in "ab"]
    nothing = {tensor.name: np.full(tensor.shape, np.nan, np.float32) for tensor in weights.layout.shared}
    bad = [forge(tmp_path / f"nan-{client}", weights, tensors=nothing, client=client) for client in "ab"]
    damaged = tmp_path / "damaged"
    damaged.write_bytes(good[0].read_bytes()[:-4])
    result = aggregate([*bad, damaged, *good], weights)
    assert [update.path for update in result.accepted] == good
    assert {update.code for update in result.rejected} == {"not_finite", "truncated"}
    assert result.weights.base == aggregate(good, weights).weights.base


def test_two_good_updates_of_a_client_conflict(tmp_path: Path, weights: Weights) -> None:
    one = send(tmp_path, weights, "a", name="one")
    other = send(tmp_path, weights, "a", name="other", examples=11)
    honest = send(tmp_path, weights, "b")
    result = aggregate([one, other, honest], weights)
    assert [update.client for update in result.accepted] == ["b"]
    assert [update.code for update in result.rejected] == ["conflict", "conflict"]
