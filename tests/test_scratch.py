"""Memory that is used again never shows in what was decoded."""

import threading
from pathlib import Path

import encoded
import numpy as np
import pytest
from encoded import EVERY

from fedpara_edge.codecs import find_encoder, open_codec
from fedpara_edge.codecs.codec import chunks
from fedpara_edge.codecs.decoding import decode_rows
from fedpara_edge.codecs.scratch import Scratch, scratch
from fedpara_edge.errors import InvalidUpdateError
from fedpara_edge.storage.tensorfile import TensorFile

SIZES = (70_000, 1, 40)
SPECS = encoded.tensors(*SIZES)
HEAVY = encoded.changes(sum(SIZES))["heavy"]
CHANGES = [HEAVY, HEAVY[::-1], HEAVY / 3]


@pytest.mark.parametrize("text", EVERY)
def test_what_was_decoded_stays_as_it_is(text: str, tmp_path: Path) -> None:
    encoder, paths, expected = find_encoder(text), [], []
    for number, change in enumerate(CHANGES):
        found = encoder.encode(SPECS, change, seed=number)
        paths.append(tmp_path / str(number))
        encoded.write(paths[-1], found.arrays, {"name": encoder.name, "version": encoder.version, **found.settings})
        expected.append(found.decoded)
    files = [TensorFile(path, format=encoded.FORMAT, error=InvalidUpdateError) for path in paths]
    decoders = [open_codec(file, SPECS) for file in files]
    with Scratch().lent():
        pieces = [
            decode_rows(decoders, start, np.empty((len(files), stop - start), np.float32))[0]
            for start, stop in chunks(sum(SIZES))
        ]
        decoded = np.concatenate([changes.values() for changes in pieces], axis=1)
    for file in files:
        file.close()
    np.testing.assert_array_equal(decoded, expected)


def test_memory_is_used_again_while_it_is_lent_and_by_one_thread_alone() -> None:
    own, seen = Scratch(), []
    with own.lent():
        first = scratch("digits", (3, 4))
        assert np.shares_memory(first, scratch("digits", (2,)))
        assert not np.shares_memory(first, scratch("scales", (3, 4)))
        assert not np.shares_memory(first, scratch("digits", (1000,)))
        other = threading.Thread(target=lambda: seen.append(scratch("digits", (2,))))
        other.start()
        other.join()
        assert not np.shares_memory(seen[0], scratch("digits", (2,)))
    assert not np.shares_memory(scratch("digits", (2,)), scratch("digits", (2,)))
