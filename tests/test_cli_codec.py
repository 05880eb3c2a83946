"""The commands that show what codecs do: `codec bench`, and `inspect` of what was encoded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_round
from command_line import Command
from safetensors.numpy import load_file, save_file

from fedpara_edge.codecs import find_encoder
from fedpara_edge.codecs.codec import in_order
from fedpara_edge.errors import InvalidUpdateError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.change import publish_change
from fedpara_edge.formats.codecbench import USUAL, Measured, compare
from fedpara_edge.formats.encoded import bits_by_tensor, open_encoded, read_change
from fedpara_edge.formats.update import write_update
from fedpara_edge.formats.weights import Weights, write_weights
from fedpara_edge.report import figures
from fedpara_edge.storage.tensorfile import TensorFile, write_tensors

LAYOUT = Layout(
    (), (small_round.tensor("a", (70, 1000)), small_round.tensor("b", (30_000,)), small_round.tensor("c", ()))
)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Weights:
    monkeypatch.chdir(tmp_path)
    return small_round.start_round(tmp_path, LAYOUT)


def send(weights: Weights, codec: str) -> Path:
    """An update in which tensor a changed a lot more than tensor b."""
    change = small_round.random_tensors(weights.layout, 2)
    change["b"] = change["b"] * np.float32(0.05)
    path = Path("u")
    write_update(path, small_round.header(weights), weights.layout, change, encoder=find_encoder(codec))
    return path


def test_bench_measures_the_usual_codecs(weights: Weights, run: Command) -> None:
    found = run("codec", "bench", send(weights, "float32"), "--weights", "base.safetensors", "--seconds", 0, "--json")
    assert found.err == ""
    rows = {row["codec"]: row for row in found.json["codecs"]}
    assert tuple(rows) == USUAL
    assert (found.json["parameters"], found.json["dense_bytes"]) == (100_001, 400_004)
    assert rows["float32"]["error"] == 0
    assert rows["float32"]["random_error"] is None
    assert rows["topk:share=0.01"]["random_error"] is None
    for name, row in rows.items():
        assert row["bits_per_parameter"] == 8 * row["bytes"] / 100_001
        assert 0 <= row["error"] < 1
        if name.startswith("rotated"):
            assert row["random_error"] == pytest.approx(row["error"], rel=0.15)
        else:
            assert row["random_error"] is None or row["error"] < row["random_error"]
        assert min(row["encode_mb_per_s"], row["decode_mb_per_s"]) > 0
    for better, worse in (("int8", "int4"), ("int4", "int3"), ("int3", "int2"), ("uniform:step=1", "uniform:step=2")):
        assert rows[better]["bytes"] > rows[worse]["bytes"]
        assert rows[better]["error"] < rows[worse]["error"]
    # Fewer bytes and less error than the classic ones.
    assert rows["uniform:step=1"]["bytes"] < rows["int3"]["bytes"]
    assert rows["uniform:step=0.5"]["error"] < rows["int3"]["error"]


def test_bench_prints_a_table_and_draws_a_picture(weights: Weights, run: Command) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs the extra report")
    update = send(weights, "uniform:step=0.1").rename(r"u $\x$")  # as if it were a formula
    options = ("--codec", "int4", "--codec", "uniform:step=2", "--seconds", 0, "--weights", "base.safetensors")
    shown = run("codec", "bench", update, *options, "--plot", "p.png").out.splitlines()
    assert shown[0] == r"u $\x$: 100,001 parameters, 0.40 MB in float32, of a dense model of 0.40 MB"
    assert [line.split()[0] for line in shown[2:]] == ["codec", "int4", "uniform:step=2"]
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    assert run("codec", "bench", update, *options, "--plot", "p.png").code == 7
    assert run("codec", "bench", update, *options, "--plot", "p.svg").code == 0
    assert b"<!-- bits per parameter, whole file -->" in Path("p.svg").read_bytes()


def test_bench_refuses_what_it_cannot_compare(weights: Weights, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    update = send(weights, "float32")
    known = ("--weights", "base.safetensors")
    unknown = run("codec", "bench", update, *known, "--codec", "zip")
    assert (unknown.code, "codec: expected one of float32, " in unknown.err) == (2, True)
    assert run("codec", "bench", update).code == 2
    assert run("codec", "bench", "nowhere", *known).code == 3
    foreign = run("codec", "bench", "base.safetensors", *known)
    assert (foreign.code, "expected fedpara-edge/update or fedpara-edge/change" in foreign.err) == (3, True)
    write_weights(Path("other"), Weights("0" * 64, 3, LAYOUT, weights.tensors))
    assert run("codec", "bench", update, "--weights", "other").code == 6
    for seconds in ("nan", "inf", "-1", "61"):
        endless = run("codec", "bench", update, *known, "--seconds", seconds)
        assert (endless.code, "seconds: expected a number from 0 to 60" in endless.err) == (2, True)
    for name in ("p.xyz", "p"):
        picture = run("codec", "bench", "nowhere", *known, "--plot", name)  # before anything is read
        assert (picture.code, ".png, .svg, .pdf" in picture.err) == (2, True)
    monkeypatch.setattr(figures, "find_spec", lambda _: None)
    without = run("codec", "bench", update, *known, "--plot", "p.png")
    assert (
        without.code,
        f"plot: expected matplotlib to be installed, found none; type: {figures.INSTALL}" in without.err,
    ) == (2, True)


def without_sums(path: Path, whole: bytes) -> None:
    """Write an update as releases up to 0.2 did, whatever is in it."""
    path.write_bytes(whole)
    with TensorFile(path, format=None, error=InvalidUpdateError) as file:
        stated = {name: value for name, value in file.header.items() if name not in ("sums", "digest")}
    write_tensors(path, load_file(path), stated)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bench_refuses_a_change_that_is_not_finite(weights: Weights, run: Command, value: float) -> None:
    whole = bytearray(send(weights, "float32").read_bytes())
    whole[-8:-4] = np.array(value, "<f4").tobytes()
    without_sums(Path("u"), whole)
    refused = run("codec", "bench", "u", "--weights", "base.safetensors")
    assert (refused.code, "expected a finite change, found NaN or Inf" in refused.err) == (3, True)
    assert len(refused.err.splitlines()) == 1
    for read in (read_change, bits_by_tensor):
        with open_encoded(Path("u"), weights) as file, pytest.raises(InvalidUpdateError) as caught:
            read(file, in_order(weights.layout.shared))
        assert caught.value.code == "not_finite"


def test_a_codec_that_can_not_express_the_change_is_left_out(weights: Weights, run: Command) -> None:
    whole = bytearray(send(weights, "float32").read_bytes())
    whole[-8:-4] = np.array(1e5, "<f4").tobytes()
    without_sums(Path("u"), whole)
    bench = (
        "codec",
        "bench",
        "u",
        "--weights",
        "base.safetensors",
        "--seconds",
        0,
        "--codec",
        "float16",
        "--codec",
        "int8",
    )
    measured = run(*bench, "--json")
    assert measured.json["left_out"] == ["float16"]
    assert [row["codec"] for row in measured.json["codecs"]] == ["int8"]
    assert "left out, as an entry of this change is too large for them: float16" in run(*bench).out


def test_nothing_to_draw_is_no_warning(weights: Weights, run: Command) -> None:
    zeros = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in weights.layout.shared}
    write_update(Path("u"), small_round.header(weights), weights.layout, zeros, encoder=find_encoder("float32"))
    bench = ("codec", "bench", "u", "--weights", "base.safetensors", "--seconds", 0, "--codec", "int8")
    ended = run(*bench, "--plot", "zero.png")
    assert (ended.code, ended.err) == (0, "")


def test_a_foreign_format_is_told_in_one_short_line(weights: Weights, run: Command) -> None:  # noqa: ARG001
    for found in ("x" * 100_000, "a\n\x1b[2J", "\ud800", [["a"]]):
        write_tensors(Path("foreign"), {}, {"format": found, "version": 1})
        ended = run("codec", "bench", "foreign", "--weights", "base.safetensors")
        assert (ended.code, len(ended.err) < 200, ended.err.rstrip("\n").isprintable()) == (3, True, True)


HEADERS: dict[str, dict[str, Any]] = {
    "that says state": {"format": "state"},
    "that says layers": {"format": "x", "layers": 3, "tensors": 4, "path": 5, "files": 6, "bytes": 7, "encoded": 8},
    "of a lone surrogate": {"format": "\ud800", "\ud801": "\ud802"},
    "of control characters": {"format": "\x1b[2J", "a\nb": ["\x1b[2J", {"\r": "\u202e"}]},
    "of a list": {"format": ["a"], "deep": [[[[[[[["\n"]]]]]]]]},
    "of an empty layout": {"format": "x", "layout": {"layers": [], "tensors": []}},
    "of a layer without tensors": {
        "format": "x",
        "layout": {
            "layers": [
                {"name": "\x1b", "operator": "linear", "kind": "dense", "form": "matrix", "shape": [2, 2], "rank": 0}
            ],
            "tensors": [],
        },
    },
}


@pytest.mark.parametrize("name", HEADERS)
def test_inspect_shows_any_header(name: str, weights: Weights, run: Command) -> None:  # noqa: ARG001
    write_tensors(Path("foreign"), {"t\n\x1b": np.zeros(2, np.float32)}, {"version": 1, **HEADERS[name]})
    shown = run("inspect", "foreign")
    assert (shown.code, shown.err) == (0, "")
    assert all(line.isprintable() for line in shown.out.split("\n"))
    found = run("inspect", "foreign", "--json").json
    assert (found["path"], found["bytes"]) == ("foreign", Path("foreign").stat().st_size)
    assert found["format"] == HEADERS[name]["format"]
    assert found["tensors"] == {"t\n\x1b": {"dtype": "float32", "shape": [2], "bytes": 8}}


@pytest.mark.parametrize(
    "more", ['"x":1e999', '"x":{"y":[-1e999]}', '"layout":3', '"layout":{"layers":[3],"tensors":[]}']
)
def test_inspect_refuses_what_it_cannot_show(more: str, weights: Weights, run: Command) -> None:  # noqa: ARG001
    save_file({}, "foreign", metadata={"fedpara_edge": f'{{"format":"x","version":1,{more}}}'})
    for options in ((), ("--json",)):
        ended = run("inspect", "foreign", *options)
        assert (ended.code, len(ended.err.splitlines()), ended.out) == (2, 1, "")


def test_a_codec_that_is_worse_in_nothing_is_measured_alike_twice(weights: Weights) -> None:
    change = np.random.default_rng(1).standard_normal(100_001).astype(np.float32)
    tensors = in_order(weights.layout.shared)

    def measure() -> list[tuple[int, float, float | None]]:
        rows: list[Measured] = list(compare(tensors, change, ["int4", "uniform"], seconds=0))
        return [(row.bytes, row.error, row.random_error) for row in rows]

    assert measure() == measure()


@pytest.mark.parametrize("codec", ["float32", "float16", "int4", "rotated", "uniform", "uniform:by=tensor", "topk"])
def test_bits_of_the_tensors_add_up_to_the_payload(weights: Weights, codec: str) -> None:
    update = send(weights, codec)
    tensors = in_order(weights.layout.shared)
    with open_encoded(update, weights) as file:
        bits = bits_by_tensor(file, tensors)
        stored = sum(entry.nbytes for entry in file.entries.values())
    total = sum(bits[tensor.name] * tensor.size for tensor in tensors)
    index = 0 if codec == "float32" else 8 * 4 * 2  # of two chunks
    assert total == pytest.approx(8 * stored - index)
    if codec in ("uniform", "topk"):
        assert bits["a"] > 5 * bits["b"]
    else:
        assert bits["a"] == pytest.approx(bits["b"], rel=0.05)


def test_inspect_shows_bits_by_tensor(weights: Weights, run: Command) -> None:
    update = send(weights, "uniform")
    shown = run("inspect", update, "--weights", "base.safetensors", "--json").json
    assert shown["codec"] == {"name": "uniform", "version": 1, "block": 0}
    assert [(part["name"], part["shape"], part["parameters"]) for part in shown["encoded"]] == [
        ("a", [70, 1000], 70_000),
        ("b", [30_000], 30_000),
        ("c", [], 1),
    ]
    text = run("inspect", update, "--weights", "base.safetensors").out
    size = update.stat().st_size
    assert f"{size:,} bytes with the header, {8 * size / 100_001:.2f} bits for each of 100,001 parameters" in text
    assert f"1/{400_004 / size:.0f} of the dense model's 0.40 MB" in text
    plain = run("inspect", update)
    assert (plain.code, "codec: block 0, name uniform, version 1" in plain.out) == (0, True)
    assert run("inspect", "base.safetensors", "--weights", "base.safetensors").code == 2


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda _: b"", lambda _: b"PK\x03\x04 and more"])
def test_inspect_ends_alike_with_weights_and_without(
    damage: Callable[[bytes], bytes], weights: Weights, run: Command
) -> None:
    update = send(weights, "uniform")
    update.write_bytes(damage(update.read_bytes()))
    plain, with_weights = run("inspect", update), run("inspect", update, "--weights", "base.safetensors")
    assert (plain.code, with_weights.code) == (2, 2)
    found = plain.err.partition(", found ")[2]
    assert found
    assert with_weights.err.endswith(found)


def test_inspect_reads_a_published_change(weights: Weights, run: Command) -> None:
    target = Weights(weights.fingerprint, 4, LAYOUT, small_round.random_tensors(LAYOUT, 5))
    publish_change(Path("change"), weights, target, find_encoder("int4"), residual=None)
    shown = run("inspect", "change", "--weights", "base.safetensors", "--json").json
    assert (shown["format"], shown["round"], len(shown["encoded"])) == ("fedpara-edge/change", 4, 3)
    assert run("inspect", "change").code == 0
