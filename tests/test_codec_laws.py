"""What every registered codec owes its readers: files that do not fit are refused when they are opened."""

import json
import math
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import encoded
import numpy as np
import pytest
from encoded import EVERY
from numpy.typing import NDArray

from fedpara_edge.codecs import ENCODERS, OPENERS, find_encoder, open_codec
from fedpara_edge.codecs.codec import Encoded
from fedpara_edge.codecs.float32 import Float32, Float32Decoder
from fedpara_edge.errors import InvalidUpdateError
from fedpara_edge.storage.tensorfile import TensorFile

SIZES = (70_000, 1, 40)
SPECS = encoded.tensors(*SIZES)
CHANGE = encoded.changes(sum(SIZES))["heavy"]
Arrays = Mapping[str, NDArray[Any]]
ADDED_LATER = {("rotated", 1): {"rotations"}}
"""Settings that an older version does not have, by name and version."""
STRANGE_VALUES = (None, True, "1", -1, 1 << 40, math.pi, [1], {})


def files_of(name: str, version: int) -> Iterator[Encoded]:
    """What the encoders of that codec store, with the settings of a version."""
    for text in EVERY:
        if find_encoder(text).name == name:
            file = find_encoder(text).encode(SPECS, CHANGE, seed=None)
            added = ADDED_LATER.get((name, version), set())
            yield replace(file, settings={key: value for key, value in file.settings.items() if key not in added})


def misfits(arrays: Arrays) -> Iterator[tuple[str, Arrays]]:
    """Arrays that no encoder stores, and what is wrong with them."""
    yield "an extra array", {**arrays, "zz": np.zeros(4, np.uint8)}
    yield "no array", {}
    for name, array in arrays.items():
        others = {key: value for key, value in arrays.items() if key != name}
        yield f"{name}: missing", others
        yield f"{name}: under another name", {**others, f"{name}_": array}
        yield f"{name}: an entry less", {**others, name: array.reshape(-1)[:-1]}
        yield f"{name}: an entry more", {**others, name: np.append(array.reshape(-1), array.reshape(-1)[-1:])}
        yield f"{name}: empty", {**others, name: array.reshape(-1)[:0]}
        yield f"{name}: an axis more", {**others, name: array[..., np.newaxis]}
        for kind in (np.int8, np.int32, np.float16, np.float64):
            yield f"{name}: {kind.__name__}", {**others, name: array.astype(kind)}
        yield f"{name}: the same bytes of another dtype", {**others, name: array.view(f"i{array.itemsize}")}


def strange(settings: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Settings that no encoder states, and what is wrong with them."""
    yield "an unknown setting", {**settings, "of_nobody": 1}
    for name in settings:
        yield f"{name}: missing", {key: value for key, value in settings.items() if key != name}
        for value in STRANGE_VALUES:
            yield f"{name}: {value!r}", {**settings, name: value}


def check_opener(name: str, version: int, path: Path) -> None:
    """The law of the opener of a codec in a version."""
    stated = {"name": name, "version": version}
    found = list(files_of(name, version))
    assert found, "nothing in encoded.EVERY writes this codec"
    for file in found:
        open_as(path, file.arrays, {**stated, **file.settings})
        for what, arrays in misfits(file.arrays):
            check_refused(what, path, arrays, {**stated, **file.settings})
        for what, settings in strange(file.settings):
            check_refused(what, path, file.arrays, {**stated, **settings})


def open_as(path: Path, arrays: Arrays, codec: Mapping[str, Any]) -> None:
    encoded.write(path, arrays, codec)
    with TensorFile(path, format=encoded.FORMAT, error=InvalidUpdateError) as file:
        open_codec(file, SPECS)


def check_refused(what: str, path: Path, arrays: Arrays, codec: Mapping[str, Any]) -> None:
    """The file is refused as every refusal should be: by an error of one line that begins with the file."""
    message = None
    try:
        open_as(path, arrays, codec)
    except InvalidUpdateError as error:
        message = str(error)
    assert message is not None, f"{what}: opened"
    assert message.startswith(f"{path}: ")
    assert message.isprintable()


@pytest.mark.parametrize(("name", "version"), OPENERS, ids=str)
def test_files_that_do_not_fit_are_refused_when_they_are_opened(name: str, version: int, tmp_path: Path) -> None:
    check_opener(name, version, tmp_path / "file")


@pytest.mark.parametrize("name", ENCODERS)
def test_what_an_encoder_writes_can_be_opened(name: str) -> None:
    texts = [text for text in EVERY if text.partition(":")[0] == name]
    assert texts, "no test encodes with it"
    for encoder in map(find_encoder, texts):
        assert (encoder.name, encoder.version) in OPENERS
        settings = encoder.encode(SPECS, CHANGE, seed=None).settings
        assert json.loads(json.dumps(settings, allow_nan=False)) == settings
        assert not settings.keys() & {"name", "version"}


class Sloppy(Float32):
    """Writes what `float32` writes."""

    name = "sloppy"


@dataclass(frozen=True)
class Opens:
    """An opener that looks at some things and not at others."""

    names: bool = True
    shapes: bool = True
    dtypes: bool = True
    extra: bool = True
    settings: bool = True

    def __call__(self, file: TensorFile, tensors: Any, settings: Mapping[str, Any]) -> Float32Decoder:
        entries = {tensor.name: file.entries.get(tensor.name) for tensor in tensors}
        found = {tensor.name: entry for tensor in tensors if (entry := entries[tensor.name]) is not None}
        good = (
            (not self.names or len(found) == len(entries))
            and (not self.extra or not file.entries.keys() - entries.keys())
            and (not self.shapes or all(found[t.name].shape == t.shape for t in tensors if t.name in found))
            and (not self.dtypes or all(entry.dtype == "float32" for entry in found.values()))
            and (not self.settings or not settings)
        )
        if not good:
            raise InvalidUpdateError(f"{file.path}: no")
        return Float32Decoder(file, [(0, sum(tensor.size for tensor in tensors), file.data_offset)], tensors)


SLOPPY = {
    Opens(names=False, shapes=False, dtypes=False, extra=False, settings=False): "an extra array: opened",
    Opens(names=False): "no array: opened",
    Opens(extra=False): "an extra array: opened",
    Opens(shapes=False): "t00: an entry less: opened",
    Opens(dtypes=False): "t00: int8: opened",
    Opens(settings=False): "an unknown setting: opened",
}


@pytest.mark.parametrize("opener", SLOPPY, ids=str)
def test_a_sloppy_codec_breaks_the_law(opener: Opens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register = cast(MutableMapping[Any, Any], OPENERS)
    monkeypatch.setitem(cast(MutableMapping[str, Any], ENCODERS), "sloppy", (Sloppy, {}))
    monkeypatch.setattr(f"{__name__}.EVERY", ("sloppy",))
    monkeypatch.setitem(register, ("sloppy", 1), Opens())
    check_opener("sloppy", 1, tmp_path / "file")
    monkeypatch.setitem(register, ("sloppy", 1), opener)
    with pytest.raises(AssertionError, match=f"^{SLOPPY[opener]}"):
        check_opener("sloppy", 1, tmp_path / "file")
