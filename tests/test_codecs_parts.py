"""The steps that codecs are made of: each with its inverse, exact where it must be."""

import numpy as np
import pytest
import zstandard
from encoded import tensors
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from hypothesis.extra.numpy import arrays as numpy_arrays
from numpy.typing import NDArray

from fedpara_edge.codecs import codec
from fedpara_edge.codecs.blocks import cut
from fedpara_edge.codecs.digits import Digits
from fedpara_edge.codecs.frames import compress, decompress, decompress_all
from fedpara_edge.codecs.hadamard import Rotation, signs, transform
from fedpara_edge.codecs.halves import Halves
from fedpara_edge.codecs.integers import Packing
from fedpara_edge.codecs.rounding import generator, round_randomly, round_to_nearest
from fedpara_edge.codecs.scales import from_bytes, round_at_random, round_down, round_up, to_bytes
from fedpara_edge.codecs.section import DamageError, Section
from fedpara_edge.codecs.sparse import LARGEST, decode_sparse, encode_sparse


def through_sparse(integers: NDArray[np.int32]) -> NDArray[np.int32]:
    stored = encode_sparse(integers)
    assert len(stored) <= 8 * len(integers) + 1024  # what a section may hold
    section = Section(np.frombuffer(stored, np.uint8))
    positions, values = decode_sparse(section, len(integers))
    section.finish()
    out = np.zeros(len(integers), np.int32)
    out[positions] = values
    return out


VECTORS = array_shapes(max_dims=1, min_side=0, max_side=200)
INTEGERS = st.one_of(st.integers(-1, 1), st.integers(-60, 60), st.integers(-LARGEST, LARGEST))


@given(numpy_arrays(np.int32, VECTORS, elements=INTEGERS, fill=st.just(0)))
def test_sparse_integers_come_back(integers: NDArray[np.int32]) -> None:
    np.testing.assert_array_equal(through_sparse(integers), integers)


@pytest.mark.parametrize("share", [0, 1e-4, 0.003, 0.05, 0.3, 0.5, 0.7, 0.95, 0.9999, 1])
@pytest.mark.parametrize("size", [1, 3, 60, 5000, LARGEST])
def test_sparse_integers_of_every_density_and_size(share: float, size: int) -> None:
    random = np.random.default_rng(5)
    integers = (random.random(70_000) < share) * random.integers(1, size + 1, 70_000) * random.choice([-1, 1], 70_000)
    np.testing.assert_array_equal(through_sparse(integers.astype(np.int32)), integers)


@pytest.mark.parametrize("largest", [1, 2, 3, 7, 15, 31, 63, 127, None])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 6, 1000, 1001])
def test_packed_integers_come_back(count: int, largest: int | None) -> None:
    most = largest or 127
    packing: Packing = Digits(largest) if largest else Halves()
    per_byte = Digits(largest).digits_per_byte if largest else 2
    assert packing.sizes(count)[1] == -(-count // per_byte)
    integers = np.random.default_rng(count).integers(-most, most + 1, (3, count)).astype(np.int8)
    parts = [packing.pack(row) for row in integers]
    assert {(len(plain), len(symbols)) for plain, symbols in parts} == {packing.sizes(count)}
    plain, symbols = (np.array([np.frombuffer(row[part], np.uint8) for row in parts]) for part in (0, 1))
    out = np.full((3, count), np.nan, np.float32)
    packing.unpack(plain, symbols, out)
    np.testing.assert_array_equal(out, integers)


@pytest.mark.parametrize("data", [b"", b"a", bytes(50_000), np.random.default_rng(0).bytes(60_000)])
def test_bytes_come_back_and_never_grow_by_more_than_one(data: bytes) -> None:
    stored = compress(data)
    assert len(stored) <= len(data) + 1
    section = Section(np.frombuffer(stored, np.uint8))
    assert decompress(section, len(data)).tobytes() == data
    section.finish()


def sections_of(*stored: bytes) -> list[Section]:
    return [Section(np.frombuffer(data, np.uint8)) for data in stored]


@pytest.fixture(params=["all frames at once", "frame by frame"])
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "frame by frame":
        monkeypatch.setattr(zstandard, "backend_features", set())
    else:
        assert "multi_decompress_to_buffer" in zstandard.backend_features


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("size", [0, 1, 1000, 200_000])
def test_bytes_of_several_sections_come_back(size: int) -> None:
    noise, rows = (
        np.random.default_rng(0).bytes(size),
        [bytes(size), bytes([7] * (size // 2) + [1] * (size - size // 2))],
    )
    contents = [rows[0], noise, *rows, noise]
    sections = sections_of(*map(compress, contents))
    assert [row.tobytes() for row in decompress_all(sections, size)] == contents
    for section in sections:
        section.finish()


SKIPPABLE = b"\x50\x2a\x4d\x18\x04\0\0\0more"
FRAME = zstandard.ZstdCompressor(level=1).compress(bytes(range(200)) * 20)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize(
    "frame",
    [
        b"",
        FRAME[:3],
        FRAME[:8],
        FRAME[:-1],
        FRAME + b"x",
        FRAME + SKIPPABLE,
        SKIPPABLE + FRAME,
        FRAME * 2,
        FRAME[:-40] + bytes([255] * 40),
        zstandard.ZstdCompressor(write_checksum=True).compress(bytes(4000)),
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(4000)),
        zstandard.ZstdCompressor().compress(bytes(4001)),
    ],
    ids=range(12),
)
def test_bytes_that_are_not_one_frame_are_refused(frame: bytes) -> None:
    good, bad = b"\1" + FRAME, b"\1" + frame
    assert len(decompress_all(sections_of(good, good), 4000)) == 2
    for stored in ([bad], [good, bad], [bad, good], [b"\0" + bytes(4000), bad]):
        with pytest.raises(DamageError, match="a Zstandard frame of 4000 bytes, found"):
            decompress_all(sections_of(*stored), 4000)
    with pytest.raises(DamageError, match="a Zstandard frame of 4000 bytes, found"):
        decompress(*sections_of(bad), 4000)


def test_blocks_lie_in_one_tensor_and_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "CHUNK_ENTRIES", 10)
    found = cut(tensors(4, 13, 0, 3), 3)
    assert [lengths.tolist() for lengths in found] == [[3, 1, 3, 3], [3, 3, 1, 3]]
    assert [lengths.tolist() for lengths in cut(tensors(4, 13, 0, 3), 0)] == [[10], [10]]
    assert [lengths.tolist() for lengths in cut(tensors(4, 13, 0, 3), 1 << 16)] == [[4, 6], [7, 3]]
    assert cut([], 3) == ()


@pytest.mark.parametrize("length", [1, 3, 4, 5, 16, 63, 64, 1000, 1024, 4096, 65536])
def test_rotation_is_its_own_inverse_and_keeps_norms(length: int) -> None:
    values = np.random.default_rng(1).standard_normal(length + 7).astype(np.float32)
    turned = values.copy()
    lengths = np.array([length, 7])
    transform(turned, lengths)
    np.testing.assert_allclose(np.linalg.norm(turned[:length]), np.linalg.norm(values[:length]), rtol=1e-5)
    transform(turned, lengths)
    np.testing.assert_allclose(turned, values, atol=3e-6)


@pytest.mark.parametrize("length", [64, 1024, 65536])
def test_rotated_integers_are_exact(length: int) -> None:
    integers = np.random.default_rng(2).choice([-127, 127, 126, 0], length).astype(np.float32)
    integers[:] = np.where(np.arange(length) < length // 2, 127, integers)
    found = integers.copy()
    transform(found, np.array([length]))
    side = int(np.sqrt(length))
    matrix = np.array([[(-1) ** (a & b).bit_count() for b in range(side)] for a in range(side)])
    expected = matrix @ integers.astype(np.int64).reshape(side, side) @ matrix
    np.testing.assert_array_equal(found.astype(np.float64) * side, expected.reshape(-1))


@pytest.mark.parametrize("largest", [1, 127])
def test_integers_of_two_rotations_are_exact(largest: int) -> None:
    rotation = Rotation(3, rotations=2, longest=1024)
    lengths = np.array([1024 * 63, 1000, 24])
    integers = np.full((2, 1 << 16), largest, np.float32)
    integers[1] = rotation.rotate(integers[1], lengths, 7)  # gathered by the way back into the largest sums there are
    integers[1] = np.clip(np.rint(integers[1]), -largest, largest)
    found = integers.copy()
    rotation.rotate_back(found, lengths, 7)
    exact = integers.astype(np.float64)
    for number in (1, 0):
        for row in exact:
            for start in range(0, 1024 * 63, 1024):
                row[start : start + 1024] = hadamard(1024) @ row[start : start + 1024] / 32
        exact *= signs(3 + (number << 32), 7, 1 << 16)
    np.testing.assert_array_equal(found[:, : 1024 * 63], exact[:, : 1024 * 63])


def test_rotating_back_is_the_inverse() -> None:
    values = np.random.default_rng(1).standard_normal(3000).astype(np.float32)
    lengths = np.array([1024, 1024, 952])
    for rotations in (1, 2):
        rotation = Rotation(5, rotations=rotations, longest=256)
        rotated = rotation.rotate(values, lengths, 100)
        assert not np.allclose(rotated, values, atol=0.1)
        rotation.rotate_back(rotated[np.newaxis], lengths, 100)
        np.testing.assert_allclose(rotated, values, atol=4e-6)


def test_random_rounding_of_scales_is_right_in_expectation() -> None:
    scales = np.repeat(np.array([2.0**-100, 1.001, 1.9999, 3e20, 2.0**100]), 100_000)
    found = round_at_random(scales, np.random.default_rng(0)).astype(np.float64).reshape(5, -1)
    np.testing.assert_allclose(found.mean(1), scales[::100_000], rtol=2.0**-7 * 5 / np.sqrt(100_000))
    assert [len(np.unique(row)) for row in found] == [1, 2, 2, 2, 1]
    np.testing.assert_array_equal(round_up(found.reshape(-1)), found.reshape(-1))


def hadamard(size: int) -> NDArray[np.float64]:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def test_pieces_of_a_rotation_are_the_largest_powers_of_four_from_the_front() -> None:
    impulse = np.zeros(16 + 4 + 4 + 3, np.float32)
    impulse[[0, 16, 20, 24]] = 4, 2, 6, 9
    transform(impulse, np.array([27]))
    np.testing.assert_array_equal(impulse, [1] * 16 + [1] * 4 + [3] * 4 + [9, 0, 0])


def test_signs_are_those_of_splitmix() -> None:
    words = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]  # of seed 0, as published with the generator
    expected = [-1 if (words[i // 64] >> (i % 64)) & 1 else 1 for i in range(128)]
    assert signs(0, 0, 128).tolist() == expected
    assert signs(0, 60, 8).tolist() == expected[60:68]
    assert signs(1, 0, 128).tolist() != expected


@given(st.floats(0, 2.0**100, width=32))
def test_scales_are_rounded_up_and_down_by_less_than_their_precision(scale: float) -> None:
    up, down = float(round_up(np.array([scale]))[0]), float(round_down(scale))
    if scale >= 2.0**-100:
        assert down <= scale <= up <= scale * (1 + 2.0**-7)
        assert down >= scale / (1 + 2.0**-7)
        assert scale in (up, down) or up > down
    else:
        assert (up, down) == (2.0**-100 if scale else 0, 0)
    stored = to_bytes(round_up(np.array([scale])))
    assert from_bytes(np.frombuffer(stored, np.uint8)).tolist() == [up]


def test_rounding() -> None:
    values = np.array([0, 0.49, -0.51, 0.69, -0.71, 1.69, -1.71, 7], np.float32)
    assert round_to_nearest(values, 0.5).tolist() == [0, 0, -1, 1, -1, 2, -2, 7]
    assert round_to_nearest(values, 0.7).tolist() == [0, 0, 0, 0, -1, 1, -2, 7]
    drawn = np.stack([round_randomly(values, generator(seed)) for seed in range(2000)])
    assert np.all((drawn == np.floor(values)) | (drawn == np.ceil(values)))
    # Each mean has the variance f (1 - f) / 2000, f the fraction.
    deviation = np.sqrt((values - np.floor(values)) * (np.ceil(values) - values) / 2000)
    assert np.all(np.abs(drawn.mean(0) - values) <= 5 * deviation)
