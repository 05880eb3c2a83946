"""The bytes of every codec, pinned by hand, and every refusal of bytes that are not theirs."""

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import encoded
import numpy as np
import pytest
import small_round
import zstandard
from encoded import EVERY

from fedpara_edge.codecs import OPENERS, find_encoder, open_codec
from fedpara_edge.errors import InvalidUpdateError
from fedpara_edge.storage.tensorfile import TensorFile

SPECS = encoded.tensors(2, 5)


CHANGE = np.array([1, -2, 0.5, 0, -0.25, 4, 0.125], np.float32)

# After the length of the only section:
GOLDEN: list[tuple[str, dict[str, Any], str, list[float]]] = [
    # 1.0 is 3c00, turned left 7800: low 00, high 78; the sign is the lowest bit: -2.0 is 8001. Not worth a frame: 00.
    ("float16", {}, "00 01 00 00 01 00 00  00  78 80 70 00 68 88 60", CHANGE.tolist()),
    ("bfloat16", {}, "00 01 00 00 01 00 00  00  7f 80 7e 00 7d 81 7c", CHANGE.tolist()),
    (
        "int8:block=16",  # scales 2/127 and 4/127, rounded up; 63 -126 16 0, -8 126 4 and none, plus 8: 47 8a 18 08 ...
        {"block": 16},
        "82 3c 02 3d  07 6a c8 88  00  40 88 10 00",
        [0.999755859375, -1.99951171875, 0.5078125, 0.0, -0.25390625, 3.9990234375, 0.126953125],
    ),
    (
        "int4:block=16",  # 3 -7 1 0, 0 7 0 and none, plus 7: 10 + 15*7, 0 + 15*14, 8 + 15*7, 7 + 15*7
        {"block": 16},
        "93 3e 13 3f  00  73 d2 71 70",
        [0.861328125, -2.009765625, 0.57421875, 0.0, 0.0, 4.01953125, 0.0],
    ),
    (
        "int3:block=16",  # 1 -3 0 0, 0 3 0 and none, plus 3: 4 + 7*3, 0 + 7*6, 3 + 7*3, 3 + 7*3
        {"block": 16},
        "2b 3f ab 3f  00  19 2a 18 18",
        [0.66796875, -2.00390625, 0.0, 0.0, 0.0, 4.0078125, 0.0],
    ),
    (
        "int2:block=16",  # 0 0 0 0 0 and -1 1, plus 1, turns: 1 + 3 + 9 + 27 + 81 less 0, and 0 + 3*2 + ...
        {"block": 16},
        "00 40 18 40  00  79 81",
        [0.0, -2.0, 0.0, 0.0, 0.0, 2.375, 0.0],
    ),
    (
        "rotated:block=16",
        {"block": 16, "bits": 4, "seed": 7647863, "rotations": 1},
        "93 3e ae 3e  00  d6 2c 6a 76",
        [0.861328125, -2.009765625, 0.33984375, 0.0, -0.33984375, 4.078125, 0.0],
    ),
    (
        "uniform:step=1",  # step 1.75; no low bits; raw bits 1 and 5; minus, plus; level 1: the second; level 2: none
        {"block": 0},
        "e0 3f  00  01 22  01  01 02  00",
        [0.0, -1.75, 0.0, 0.0, 0.0, 3.5, 0.0],
    ),
    (
        "uniform:step=1,by=tensor",
        {"block": 65536},
        "cb 3f e8 3f  00  01 22  01  01 02  00",
        [0.0, -1.5859375, 0.0, 0.0, 0.0, 3.625, 0.0],
    ),
    (
        "topk:share=0.4,bits=1",  # from 1 in steps of 3: raw bits 0, 1 and 5; the second is minus; level 1: the third
        {},
        "80 3f 40 40  00  01 23  02  01 04  00",
        [1.0, -1.0, 0.0, 0.0, 0.0, 4.0, 0.0],
    ),
]
# What earlier releases wrote.
OLD: list[tuple[str, int, dict[str, Any], str, list[float]]] = [
    (
        "int8",  # each integer plus 127
        1,
        {"block": 16},
        "82 3c 02 3d  00  be 01 8f 7f 77 fd 83",
        [0.999755859375, -1.99951171875, 0.5078125, 0.0, -0.25390625, 3.9990234375, 0.126953125],
    ),
    (
        "rotated",
        1,
        {"block": 16, "bits": 4, "seed": 7647863},
        "93 3e ae 3e  00  d6 2c 6a 76",
        [0.861328125, -2.009765625, 0.33984375, 0.0, -0.33984375, 4.078125, 0.0],
    ),
]
LATEST = dict(sorted(OPENERS))


def write_section(path: Path, name: str, settings: dict[str, Any], *sections: bytes, **codec: Any) -> None:
    payload = b"".join([struct.pack(f"<{len(sections)}I", *map(len, sections)), *sections])
    stated = {"name": name, "version": LATEST[name], **settings, **codec}
    encoded.write(path, {"payload": np.frombuffer(payload, np.uint8)}, stated)


@pytest.mark.parametrize(("text", "settings", "section", "decoded"), GOLDEN, ids=lambda value: str(value)[:20])
def test_golden_bytes(tmp_path: Path, text: str, settings: dict[str, Any], section: str, decoded: list[float]) -> None:
    found = find_encoder(text).encode(SPECS, CHANGE, seed=None)
    expected = bytes.fromhex(section)
    assert found.arrays.keys() == {"payload"}
    assert found.arrays["payload"].tobytes().hex(" ") == (len(expected).to_bytes(4, "little") + expected).hex(" ")
    assert found.settings == settings
    write_section(tmp_path / "file", text.split(":")[0], settings, expected)
    np.testing.assert_array_equal(encoded.decode(tmp_path / "file", SPECS), np.float32(decoded))


def test_every_payload_is_pinned() -> None:
    pinned = {(text.split(":")[0], find_encoder(text).version) for text, *_ in GOLDEN}
    assert pinned | {(name, version) for name, version, *_ in OLD} == set(OPENERS) - {("float32", 1)}


@pytest.mark.parametrize(("name", "version", "settings", "section", "decoded"), OLD)
def test_what_earlier_releases_wrote_is_read(
    tmp_path: Path, name: str, version: int, settings: dict[str, Any], section: str, decoded: list[float]
) -> None:
    write_section(tmp_path / "file", name, settings, bytes.fromhex(section), version=version)
    np.testing.assert_array_equal(encoded.decode(tmp_path / "file", SPECS), np.float32(decoded))
    for length in range(len(bytes.fromhex(section))):
        write_section(tmp_path / "file", name, settings, bytes.fromhex(section)[:length], version=version)
        refused(tmp_path / "file")
    write_section(tmp_path / "file", name, settings, bytes.fromhex(section)[:-1] + b"\xff", version=version)
    largest = 2 ** (settings.get("bits", 8) - 1) - 1
    assert f"integers from -{largest} to {largest}, found a byte of 255" in refused(tmp_path / "file")


def test_golden_frame(tmp_path: Path) -> None:
    # A Zstandard frame of 500 bytes (less 256: f4 00), the last block of which repeats 00; with 99, integers 1.
    frame = bytes.fromhex("28b52ffd 60 f400 a30f00 00")
    specs = encoded.tensors(1000)
    section = bytes.fromhex("803f" + "99" * 500 + "01") + frame
    write_section(tmp_path / "file", "int8", {"block": 1024}, section)
    np.testing.assert_array_equal(encoded.decode(tmp_path / "file", specs), np.ones(1000, np.float32))


def test_golden_rice_code(tmp_path: Path) -> None:
    # The gaps before bits 5, 6 and 20 of 64 are 5, 0 and 13; with k = 2: low bits 1 0 1 and 0 0 0, then 1, 0, 3 zeros,
    # each with a one behind. Signs: the last. Level 1: all (no bit clear); level 2: none.
    section = bytes.fromhex("0040  00  12 03  05 00  46  04  20 00  00")
    write_section(tmp_path / "file", "uniform", {"block": 0}, section)
    expected = np.zeros(64, np.float32)
    expected[[5, 6, 20]] = 4, 4, -4
    np.testing.assert_array_equal(encoded.decode(tmp_path / "file", encoded.tensors(64)), expected)


def refused(path: Path, specs: Any = SPECS, code: str = "payload") -> str:
    with pytest.raises(InvalidUpdateError) as caught:
        encoded.decode(path, specs)
    assert caught.value.code == code, caught.value
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < 500
    return message


def good(text: str) -> bytes:
    return bytes.fromhex(next(section for found, _, section, _ in GOLDEN if found == text))


@pytest.mark.parametrize(("text", "settings", "section", "_"), GOLDEN, ids=lambda value: str(value)[:20])
def test_every_shortened_section_is_refused(
    tmp_path: Path, text: str, settings: dict[str, Any], section: str, _: Any
) -> None:
    whole = bytes.fromhex(section)
    for length in range(len(whole)):
        write_section(tmp_path / "file", text.split(":")[0], settings, whole[:length])
        assert "tensors 't00' to 't01': expected" in refused(tmp_path / "file")
    write_section(tmp_path / "file", text.split(":")[0], settings, whole + b"\0")
    refused(tmp_path / "file")


@pytest.mark.parametrize("bits", ["c07f", "807f", "80ff", "80bf", "0001", "0072"])  # NaN, Inf, -Inf, -1, tiny, huge
@pytest.mark.parametrize("text", ["int8:block=16", "int4:block=16", "uniform:step=1,by=tensor"])
def test_scales_out_of_range_are_refused_with_their_tensor(tmp_path: Path, text: str, bits: str) -> None:
    settings = next(found for name, found, _, _ in GOLDEN if name == text)
    section = good(text)[:2] + bytes.fromhex(bits) + good(text)[4:]
    write_section(tmp_path / "file", text.split(":")[0], settings, section)
    assert "tensor 't01': expected scales of 0 or from 2^-100 to 2^100, found" in refused(tmp_path / "file")


HOSTILE = [
    ("int8", "82 3c 02 3d  07 68 c8 88  00  40 88 10 00", "integers from -127 to 127, found -128"),
    ("int4", "93 3e 13 3f  00  73 d2 71 e1", "integers from -7 to 7, found a byte of 225"),
    ("int2", "00 40 18 40  00  79 f3", "integers from -1 to 1, found a byte of 243"),
    ("int4", "93 3e 13 3f  02  73 d2 71 70", "kind 0 or 1, found kind 2"),
    ("int4", "93 3e 13 3f  01  73 d2 71 70", "a Zstandard frame of 4 bytes"),
    ("uniform", "e0 3f  10  01 22  01  00", "at most 15 low bits, found 16"),
    ("uniform", "e0 3f  00  02 22  01  00", "found kind 2"),
    ("uniform", "e0 3f  00  30 22  01  00", "found kind 48"),
    ("uniform", "e0 3f  00  10 08 ff  01  00", "at most 7 gaps, found 8"),
    ("uniform", "e0 3f  00  10 ff ff ff ff ff", "a number of gaps of 3 bytes, found a longer one"),
    ("uniform", "e0 3f  00  10 02 01  00  00", "2 gaps, found 1"),
    ("uniform", "e0 3f  00  13 01  01 01 01  01  01  00", "bits among 7, found number 7"),
    ("uniform", "e0 3f  00  10 01 80  01  00", "bits among 7, found number 7"),
    ("uniform", "e0 3f  00  01 22  01" + " 20 00" * 32 + "ff ff ff ff 00 00 00 00", "integers up to 1048576"),
    ("uniform", "e0 3f  0f  01 22  01" + " 20 00" * 32 + "00 00 00 00" * 2 + "03" * 15, "integers up to 1048576"),
    ("topk", "80 3f 80 7f  00  01 23  02  01 04  00", "scales of 0 or from"),
]


@pytest.mark.parametrize(("name", "section", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_sections_that_make_no_sense(tmp_path: Path, name: str, section: str, message: str) -> None:
    settings = {"topk": {}, "uniform": {"block": 0}}.get(name, {"block": 16})
    write_section(tmp_path / "file", name, settings, bytes.fromhex(section))
    assert message in refused(tmp_path / "file")


def frame(content: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(content)


def claiming(size: int) -> bytes:
    """A frame of a few bytes that states and repeats its way to `size`."""
    compressor = zstandard.ZstdCompressor(write_checksum=False).compressobj(size=size)
    parts = [compressor.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join([*parts, compressor.flush()])


def test_decompression_bombs_allocate_nothing(tmp_path: Path) -> None:
    size = 4096
    specs = encoded.tensors(2 * size)
    exact = frame(bytes(size))
    no_size = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(size))
    lying = bytearray(claiming(1 << 30))
    assert lying[4] == 0x80  # after a byte for its window, 4 bytes of size
    lying[6:10] = size.to_bytes(4, "little")
    dictionary = zstandard.ZstdCompressionDict(bytes(range(256)) * 64, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    other = zstandard.ZstdCompressor(dict_data=dictionary).compress(bytes(range(256)) * 16)
    bad = [claiming(1 << 30), no_size, bytes(lying), frame(bytes(size + 1)), frame(b""), exact + b"x", exact * 2, other]
    for data in bad:
        write_section(tmp_path / "file", "int8", {"block": 65536}, bytes.fromhex("803f") + bytes(size) + b"\1" + data)
        tracemalloc.start()
        message = refused(tmp_path / "file", specs)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert "tensor 't00': expected a Zstandard frame of 4096 bytes" in message
        assert peak < 1_000_000 + 3 * len(data)


def test_an_index_that_does_not_fit(tmp_path: Path) -> None:
    section = good("uniform:step=1")
    stated = {"name": "uniform", "version": 1, "block": 0}
    for index in (len(section) + 1, len(section) - 1, 0, 2**32 - 1):
        payload = np.frombuffer(struct.pack("<I", index) + section, np.uint8)
        encoded.write(tmp_path / "file", {"payload": payload}, stated)
        assert "sections that fill" in refused(tmp_path / "file")
    huge = bytes(8 * 7 + 1024 + 1)
    write_section(tmp_path / "file", "uniform", {"block": 0}, huge)
    assert "the largest 1081" in refused(tmp_path / "file")
    specs = encoded.tensors(65536, 1)
    for sections in ((), (section,), (section, section, section)):
        write_section(tmp_path / "file", "uniform", {"block": 0}, *sections)
        refused(tmp_path / "file", specs)


def test_arrays_that_do_not_fit(tmp_path: Path) -> None:
    payload = find_encoder("int4").encode(SPECS, CHANGE, seed=None).arrays["payload"]
    stated = {"name": "int4", "version": 1, "block": 1024}
    for arrays in (
        {},
        {"payload": payload.astype(np.int8)},
        {"payload": payload[:, None]},
        {"other": payload},
        {"payload": payload, "t00": CHANGE[:2]},
    ):
        encoded.write(tmp_path / "file", arrays, stated)
        assert "expected one array 'payload' of uint8" in refused(tmp_path / "file")


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("float16", {"block": 16}),
    ("int4", {}),
    ("int4", {"block": 15}),
    ("int4", {"block": 65537}),
    ("int4", {"block": 16.0}),
    ("int4", {"block": True}),
    ("int4", {"block": "16"}),
    ("int4", {"block": [16]}),
    ("int4", {"block": "16\n\x1b[32maccepted"}),
    ("int4", {"block": 16, "bits": 4}),
    ("rotated", {"block": 16, "bits": 4, "seed": 0}),
    ("rotated", {"block": 16, "bits": 9, "seed": 0, "rotations": 1}),
    ("rotated", {"block": 16, "bits": 1, "seed": 0, "rotations": 1}),
    ("rotated", {"block": 16, "bits": 4, "seed": -1, "rotations": 1}),
    ("rotated", {"block": 16, "bits": 4, "seed": 2**32, "rotations": 1}),
    ("rotated", {"block": 16, "bits": 4, "seed": 0, "rotations": 0}),
    ("rotated", {"block": 16, "bits": 4, "seed": 0, "rotations": 3}),
    ("uniform", {"block": -1}),
    ("uniform", {"block": 1}),
    ("uniform", {"block": 65535}),
    ("topk", {"share": 0.1}),
]


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)
def test_settings_of_another_release_are_refused_by_name(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    write_section(tmp_path / "file", name, settings, b"")
    message = refused(tmp_path / "file", code="unknown_codec")
    assert f"codec {name}: " in message
    assert message.endswith("update fedpara-edge here")


@pytest.mark.parametrize("name", sorted({name for name, _ in OPENERS}))
def test_a_version_of_another_release_is_refused(tmp_path: Path, name: str) -> None:
    for settings in ({}, {f"setting-{number}": number for number in range(20)}):
        write_section(tmp_path / "file", name, settings, b"", version=LATEST[name] + 1)
        assert f"found {name} version {LATEST[name] + 1}; update fedpara-edge" in refused(
            tmp_path / "file", code="unknown_codec"
        )


@pytest.mark.slow
@pytest.mark.parametrize("text", [text for text in EVERY if text != "float32"])
def test_damage_anywhere_is_refused_or_decodes_to_numbers(tmp_path: Path, text: str) -> None:
    # Whatever the bytes are: no other error, nothing infinite, and no more memory than a whole file takes.
    specs = encoded.tensors(3000, 1, 40)
    random = np.random.default_rng(0)
    change = random.standard_t(3, 3041).astype(np.float32)
    encoder = find_encoder(text)
    whole = encoder.encode(specs, change, seed=3)
    stated = {"name": encoder.name, "version": encoder.version, **whole.settings}
    payload = whole.arrays["payload"]
    files = []
    for _ in range(120):
        files.append(payload.copy())
        for place in random.integers(4, len(payload), random.integers(1, 4)):
            files[-1][min(place, random.integers(4, 40))] = random.integers(256)
            files[-1][place] = random.integers(256)
    for path, spoilt in enumerate(files):
        encoded.write(tmp_path / f"{path}", {"payload": spoilt}, stated)

    def refusals() -> int:
        refused = 0
        for path in range(len(files)):
            try:
                assert np.isfinite(encoded.decode(tmp_path / f"{path}", specs)).all() or "float16" in text
            except InvalidUpdateError:
                refused += 1
        return refused

    assert refusals() > 10 or "float16" in text
    tracemalloc.start()  # where all is imported
    refusals()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000


@pytest.mark.parametrize(("name", "settings"), [("uniform", {"block": 0}), ("topk", {}), ("int8", {"block": 16})])
@pytest.mark.parametrize("shapes", [[(5_000_000,)], [(1 << 60,)], [(1 << 60,)] * 16], ids=str)
def test_a_small_file_makes_nobody_allocate(
    tmp_path: Path, name: str, settings: dict[str, Any], shapes: list[tuple[int, ...]]
) -> None:
    specs = [small_round.tensor(f"t{number:02}", shape) for number, shape in enumerate(shapes)]
    encoded.write(
        tmp_path / "file", {"payload": np.zeros(100, np.uint8)}, {"name": name, "version": LATEST[name], **settings}
    )
    with TensorFile(tmp_path / "file", format=None, error=InvalidUpdateError) as file:
        tracemalloc.start()
        with pytest.raises(InvalidUpdateError, match=r"tensors 't00' to 't.*: expected at least .* bytes"):
            open_codec(file, specs)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 100_000
