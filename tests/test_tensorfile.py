"""The container: its bytes, and what of everything else it refuses."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fedpara_edge.errors import FedparaError, InvalidUpdateError
from fedpara_edge.storage.tensorfile import Entry, TensorFile, write_tensors
from fedpara_edge.storage.tensortable import DTYPES

TENSORS = {"b": np.array([[1, -2]], np.float32), "a": np.array(3, np.int64), "c": np.array([7, 255], np.uint8)}
HEADER = {"format": "test", "version": 1, "name": "é"}
TABLE = (
    rb'{"__metadata__":{"fedpara_edge":"{\"format\":\"test\",\"name\":\"\\u00e9\",\"version\":1}"},'
    rb'"a":{"dtype":"I64","shape":[],"data_offsets":[0,8]},'
    rb'"b":{"dtype":"F32","shape":[1,2],"data_offsets":[8,16]},'
    rb'"c":{"dtype":"U8","shape":[2],"data_offsets":[16,18]}}'
)
DATA = bytes.fromhex("0300000000000000 0000803f 000000c0 07ff")


def container(table: bytes, data: bytes) -> bytes:
    return len(table).to_bytes(8, "little") + table + data


def padded(table: bytes) -> bytes:
    return table + b" " * (-len(table) % 8)


def table(tensors: str, header: str = '{"format":"test","version":1}') -> bytes:
    return ('{"__metadata__":{"fedpara_edge":' + json.dumps(header) + "}" + tensors + "}").encode()


def entry(begin: int, end: int, shape: str = "[1]", dtype: str = "F32") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}'


def opened(path: Path) -> TensorFile:
    return TensorFile(path, format="test", error=InvalidUpdateError)


def refused(path: Path) -> InvalidUpdateError:
    with pytest.raises(InvalidUpdateError) as caught:
        opened(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).replace(str(path), "").isprintable()
    assert len(str(caught.value)) < 600 + len(str(path))
    return caught.value


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.safetensors"


def test_golden_bytes(path: Path) -> None:
    write_tensors(path, TENSORS, HEADER)
    assert path.read_bytes() == container(padded(TABLE), DATA)


@pytest.mark.slow
def test_bytes_are_the_same_in_every_process_and_for_every_memory_order(path: Path) -> None:
    write_tensors(path, TENSORS, HEADER)
    expected = path.read_bytes()
    strided = {name: np.array([value, value]).T[..., 0] for name, value in reversed(TENSORS.items())}
    write_tensors(path, {**strided, "b": strided["b"].T}, dict(reversed(HEADER.items())))
    assert path.read_bytes() == expected
    program = (
        "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path; import test_tensorfile as t;"
        "t.write_tensors(Path(sys.argv[1]), t.TENSORS, t.HEADER)"
    )
    for seed in ("1", "2"):
        path.unlink()
        subprocess.run(
            [sys.executable, "-c", program, str(path), str(Path(__file__).parent)],
            check=True,
            env={"PYTHONHASHSEED": seed},
        )
        assert path.read_bytes() == expected


def test_what_is_written_is_read(path: Path) -> None:
    write_tensors(path, TENSORS, HEADER)
    with opened(path) as file:
        assert file.header == HEADER
        assert list(file.entries) == ["a", "b", "c"]
        assert file.entries["b"] == Entry("float32", (1, 2), file.data_offset + 8, 8)
        assert file.size_bytes == path.stat().st_size
        for name, value in TENSORS.items():
            found = file.read(name)
            assert found.dtype == value.dtype
            assert found.shape == value.shape
            np.testing.assert_array_equal(found, value)


def test_every_dtype_comes_back(path: Path) -> None:
    tensors = {name: np.ones((2, 0, 3) if name == "int16" else (2, 3), name) for name in DTYPES.values()}
    write_tensors(path, tensors, HEADER)
    with opened(path) as file:
        for name, value in tensors.items():
            np.testing.assert_array_equal(file.read(name), value, strict=True)


def test_safetensors_reads_it(path: Path) -> None:
    write_tensors(path, TENSORS, HEADER)
    for name, value in load_file(path).items():
        np.testing.assert_array_equal(value, TENSORS[name], strict=True)
    with safe_open(path, "numpy") as file:
        assert json.loads(file.metadata()["fedpara_edge"]) == HEADER


def test_files_of_equal_layout_share_their_table(tmp_path: Path) -> None:
    for name in ("x", "y"):
        write_tensors(tmp_path / name, TENSORS, {**HEADER, "name": name})
    with opened(tmp_path / "x") as one, opened(tmp_path / "y") as other:
        assert one.entries is other.entries


def test_a_long_table_is_parsed_anew_and_not_kept(tmp_path: Path) -> None:
    tensors = {f"{number:0300}": np.zeros(0, np.float32) for number in range(1000)}
    for name in ("x", "y"):
        write_tensors(tmp_path / name, tensors, HEADER)
    with opened(tmp_path / "x") as one, opened(tmp_path / "y") as other:
        assert one.entries == other.entries
        assert one.entries is not other.entries


def test_truncated_at_every_byte(path: Path) -> None:
    whole = container(padded(TABLE), DATA)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert refused(path).code == "truncated", length


def test_with_any_byte_of_the_table_changed_it_is_read_or_refused_but_never_fails_otherwise(path: Path) -> None:
    whole = container(padded(TABLE), DATA)
    for position in range(8 + len(TABLE)):
        value = (0x22, 0x39, 0x7B, 0xFF)[position % 4]
        path.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
        with suppress(InvalidUpdateError), opened(path) as file:
            for name in file.entries:
                file.read(name)


HOSTILE = {
    "a byte too many": (table(f',"a":{entry(0, 4)}'), bytes(5), "not_safetensors"),
    "a hole": (table(f',"a":{entry(0, 4)},"b":{entry(8, 12)}'), bytes(12), "not_safetensors"),
    "a hole at the start": (table(f',"a":{entry(4, 8)}'), bytes(8), "not_safetensors"),
    "an overlap": (table(f',"a":{entry(0, 4)},"b":{entry(2, 6)}'), bytes(6), "not_safetensors"),
    "two in one place": (table(f',"a":{entry(0, 4)},"b":{entry(0, 4)}'), bytes(4), "not_safetensors"),
    "end before begin": (table(f',"a":{entry(4, 0)}'), bytes(4), "not_safetensors"),
    "a size that is not the shape's": (table(f',"a":{entry(0, 4, "[2]")}'), bytes(4), "not_safetensors"),
    "a negative shape": (table(f',"a":{entry(0, 4, "[-1,-1]")}'), bytes(4), "not_safetensors"),
    "a fractional shape": (table(f',"a":{entry(0, 4, "[1.0]")}'), bytes(4), "not_safetensors"),
    "a true shape": (table(f',"a":{entry(0, 4, "[true]")}'), bytes(4), "not_safetensors"),
    "a shape of text": (table(f',"a":{entry(0, 4, chr(34) + "1" + chr(34))}'), bytes(4), "not_safetensors"),
    "a huge shape": (table(f',"a":{entry(0, 1 << 70, f"[{1 << 68}]")}'), bytes(4), "not_safetensors"),
    "a huge empty shape": (table(f',"a":{entry(0, 0, f"[0,{1 << 63}]")}'), b"", "not_safetensors"),
    "more dimensions than numpy has": (table(f',"a":{entry(0, 4, str([1] * 65))}'), bytes(4), "not_safetensors"),
    "an unknown dtype": (table(f',"a":{entry(0, 4, dtype="F4")}'), bytes(4), "not_safetensors"),
    "no dtype": (table(',"a":{"shape":[1],"data_offsets":[0,4]}'), bytes(4), "not_safetensors"),
    "one offset": (table(',"a":{"dtype":"F32","shape":[1],"data_offsets":[4]}'), bytes(4), "not_safetensors"),
    "an entry that is a list": (table(',"a":[]'), b"", "not_safetensors"),
    "a tensor twice": (table(f',"a":{entry(0, 4)},"a":{entry(0, 4)}'), bytes(4), "not_safetensors"),
    "a key twice in an entry": (
        table(',"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}'),
        bytes(4),
        "not_safetensors",
    ),
    "metadata twice": (table(',"__metadata__":{}'), b"", "not_safetensors"),
    "our header twice": (
        b'{"__metadata__":{"fedpara_edge":"{}","fedpara_edge":"{}"}}',
        b"",
        "not_safetensors",
    ),
    "metadata that is no text": (b'{"__metadata__":{"fedpara_edge":1}}', b"", "not_safetensors"),
    "metadata that is a list": (b'{"__metadata__":[]}', b"", "not_safetensors"),
    "metadata at the end": (b'{"a":' + entry(0, 4).encode() + b',"__metadata__":{}}', bytes(4), "wrong_format"),
    "no metadata": (b'{"a":' + entry(0, 4).encode() + b"}", bytes(4), "wrong_format"),
    "metadata without our header": (b'{"__metadata__":{"format":"pt"}}', b"", "wrong_format"),
    "our header in no JSON": (table("", "{"), b"", "wrong_format"),
    "our header with a key twice": (table("", '{"format":"test","version":1,"version":1}'), b"", "wrong_format"),
    "our header with NaN": (table("", '{"format":"test","version":1,"loss":NaN}'), b"", "wrong_format"),
    "our header nested deeply": (table("", "[" * 100_000), b"", "wrong_format"),
    "our header as a list": (table("", "[]"), b"", "wrong_format"),
    "another format": (table("", '{"format":"other","version":1}'), b"", "wrong_format"),
    "another version": (table("", '{"format":"test","version":2}'), b"", "wrong_format"),
    "a format of control characters": (
        table("", '{"format":"a\\n\\u001b[2J\\ud800","version":1}'),
        b"",
        "wrong_format",
    ),
    "a long format": (table("", f'{{"format":"{"x" * 100_000}","version":1}}'), b"", "wrong_format"),
    "a long version": (table("", f'{{"format":"test","version":"{"x" * 100_000}\\n"}}'), b"", "wrong_format"),
    "a nested version": (table("", f'{{"format":"test","version":{"[" * 500}{"]" * 500}}}'), b"", "wrong_format"),
    "a long name": (table(f',"{"x" * 100_000}":[]'), b"", "not_safetensors"),
    "no version": (table("", '{"format":"test"}'), b"", "wrong_format"),
    "a table that is a list": (b"[]", b"", "not_safetensors"),
    "a table of no JSON": (b"{'a'}", b"", "wrong_format"),
    "a table nested deeply": (b'{"__metadata__":' + b"[" * 100_000, b"", "not_safetensors"),
    "a comma too many": (table(","), b"", "not_safetensors"),
    "something after the table": (table("") + b"{}", b"", "not_safetensors"),
    "a table that is not UTF-8": (b"\xff" * 16, b"", "not_safetensors"),
    "an empty table": (b"", b"", "not_safetensors"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files(kind: str, path: Path) -> None:
    text, data, code = HOSTILE[kind]
    path.write_bytes(container(text, data))
    assert refused(path).code == code


def test_a_header_longer_than_allowed_is_not_even_read(path: Path) -> None:
    for length in (17 << 20, 1 << 40, (1 << 64) - 1):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        assert refused(path).code == "not_safetensors"


def test_other_files(tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    assert refused(image).code == "not_safetensors"
    empty = tmp_path / "empty"
    empty.touch()
    assert str(refused(empty)) == f"{empty}: expected a whole safetensors file, found an empty file; copy it again"
    assert refused(empty).code == "truncated"
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": np.zeros(3, np.float32)}, foreign)
    assert refused(foreign).code == "wrong_format"
    assert refused(tmp_path).code == "unreadable"
    assert refused(tmp_path / "missing").code == "unreadable"
    assert refused(tmp_path / "a\0b").code == "unreadable"


def save_npz(path: Path) -> None:
    with path.open("wb") as file:  # numpy would add its own ending
        np.savez(file, x=np.zeros((50, 4), np.float32), y=np.zeros(50, np.int64))


def save_pytorch(path: Path, *, zipped: bool) -> None:
    torch.save({"w": torch.zeros(3)}, path, _use_new_zipfile_serialization=zipped)


def save_onnx(path: Path, **fields: str) -> None:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "identity", [x], [x])
    onnx.save(onnx.helper.make_model(graph, **fields), path)


FOREIGN = {
    "data.npz": (save_npz, "an .npz archive of numpy arrays"),
    "weights.safetensors": (save_npz, "an .npz archive of numpy arrays"),
    "x.npy": (lambda path: np.save(path, np.zeros(9)), "a numpy array (.npy)"),
    "model.pt": (partial(save_pytorch, zipped=True), "a PyTorch file"),
    "old.pt": (partial(save_pytorch, zipped=False), "a PyTorch file"),
    "model.onnx": (save_onnx, "an ONNX model"),
    "exported.onnx": (partial(save_onnx, producer_name="pytorch"), "an ONNX model"),
    "manifest.json": (lambda path: path.write_text('{\n "schema": 1\n}\n'), "a JSON file"),
    "fedpara.toml": (lambda path: path.write_text("[train]\nepochs = 2\n"), "a TOML file"),
    "labels.csv": (lambda path: path.write_text("name,größe\n" * 200), "a text file"),
    "foreign.safetensors": (
        partial(save_file, {"a": np.zeros(3, np.float32)}),
        "a safetensors file without our header",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_kind_is_named_for_what_it_is(name: str, tmp_path: Path) -> None:
    save, kind = FOREIGN[name]
    path = tmp_path / name
    save(path)
    assert str(refused(path)) == f"{path}: expected test, found {kind}; check the path"


@pytest.mark.parametrize("suffix", [".safetensors", ".onnx", ".json", ".toml", ""])
def test_a_damaged_file_of_ours_is_never_taken_for_another_kind(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"file{suffix}"
    whole = container(padded(TABLE), DATA)
    broken = [whole[:length] for length in range(1, len(whole))]
    broken += [whole[:position] + b"\xff" + whole[position + 1 :] for position in range(8)]
    broken += [whole + b"{", b"\xff" * 600, b"PK" + bytes(600)]
    for content in broken:
        path.write_bytes(content)
        assert "expected a whole safetensors file, found " in str(refused(path))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("Windows has no named pipes in folders")
    os.mkfifo(tmp_path / "pipe")
    assert refused(tmp_path / "pipe").code == "unreadable"


def test_names_are_never_paths(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    path = inner / "file"
    write_tensors(path, {"../../x": TENSORS["b"], "/etc/passwd": TENSORS["b"]}, HEADER)
    before = sorted(tmp_path.rglob("*"))
    with opened(path) as file:
        np.testing.assert_array_equal(file.read("../../x"), TENSORS["b"])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_shrinks_while_it_is_open(path: Path) -> None:
    write_tensors(path, TENSORS, HEADER)
    with opened(path) as file:
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(InvalidUpdateError, match="; copy it again") as caught:
            file.read("c")
        assert caught.value.code == "truncated"


def test_reopening_finds_the_same_file_or_says_that_it_changed(path: Path) -> None:
    write_tensors(path, TENSORS, HEADER)
    file = opened(path)
    file.close()
    file.reopen()
    np.testing.assert_array_equal(file.read("b"), TENSORS["b"])
    file.close()
    write_tensors(path, TENSORS, HEADER)  # the same bytes in another file
    with pytest.raises(InvalidUpdateError) as caught:
        file.reopen()
    assert caught.value.code == "changed"
    path.unlink()
    with pytest.raises(InvalidUpdateError) as caught:
        file.reopen()
    assert caught.value.code == "unreadable"


def test_a_failed_open_leaves_no_file_open(path: Path) -> None:
    # An open file that is collected raises ResourceWarning, which the tests turn into an error.
    path.write_bytes(container(padded(TABLE), DATA)[:-1])
    for _ in range(50):
        refused(path)


def test_an_ordinary_value_stands_in_a_message_as_it_is(path: Path) -> None:
    write_tensors(path, TENSORS, {"format": "fedpara-edge/update", "version": 1})
    assert "expected test, found fedpara-edge/update; " in str(refused(path))
    write_tensors(path, TENSORS, {"format": "test", "version": 2})
    assert "expected test version 1, found version 2; " in str(refused(path))


def test_an_error_is_of_the_class_that_was_asked_for(path: Path) -> None:
    with pytest.raises(FedparaError, match="expected a readable file") as caught:
        TensorFile(path, format=None, error=FedparaError)
    assert type(caught.value) is FedparaError


def test_a_table_that_would_not_be_read_is_not_written(tmp_path: Path) -> None:
    one = {"x" * (1 << 23): np.zeros(1, np.float32)}
    write_tensors(tmp_path / "file", one, {"format": "a", "version": 1})
    TensorFile(tmp_path / "file", format="a", error=InvalidUpdateError).close()
    two = one | {"y" * (1 << 23): np.zeros(1, np.float32)}
    with pytest.raises(FedparaError, match=r"expected a header of at most 16777216 bytes, found 16777[0-9]{3}, which"):
        write_tensors(tmp_path / "other", two, {"format": "a", "version": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
