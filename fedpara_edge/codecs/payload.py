"""The payload: the chunks of an encoded change, one after the other in one array of bytes.

    lengths     uint32, little-endian, of each chunk: bytes of its section
    sections    of each chunk, end to end; their content is defined by the codec

It is stored as a single array `payload`, uint8 [bytes]. A section decodes without the others. It has at most 8 bytes
per entry of its chunk plus 1024, more than any codec needs, which bounds what is ever read into memory; its decoded
size is bounded by the entries of the chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs import codec
from fedpara_edge.codecs.blocks import cut
from fedpara_edge.codecs.changes import BlockScales
from fedpara_edge.codecs.codec import Encoded, spelled_range
from fedpara_edge.codecs.scratch import scratch
from fedpara_edge.codecs.section import DamageError, Section
from fedpara_edge.codecs.sums import Sums, damaged, read_sums, sum_of, sums_of_rows
from fedpara_edge.errors import InvalidUpdateError
from fedpara_edge.factors.layout import TensorSpec
from fedpara_edge.storage.tensorfile import TensorFile

NAME = "payload"
STATISTICS = "statistics"
"""Array beside it in files with running statistics (`statistics`)."""

Write = Callable[[int, NDArray[np.float32], NDArray[np.intp], NDArray[np.float32]], bytes]
"""Function that encodes a chunk: (number of its first entry, change, block lengths, array for the decoded change)."""

Read = Callable[[Section, NDArray[np.intp], NDArray[np.float32]], None]
"""Function that decodes a chunk: (its section, block lengths, array for the change)."""


class SectionDecoder(Protocol):
    """Decoder of sections; equal ones decode the sections of several files in one go."""

    def decode(
        self,
        start: int,
        stored: NDArray[np.uint8],
        sizes: Sequence[int],
        lengths: NDArray[np.intp],
        out: NDArray[np.float32],
    ) -> BlockScales | None:
        """Decode the same chunk of several files with the same tensors.

        Args:
            start: Number of the chunk's first entry in the flat change.
            stored: Sections, uint8 [files, at least the largest of `sizes`].
            sizes: Bytes of each section.
            lengths: Block lengths in entries.
            out: Array to fill with changes or integers, float32 [files, entries of the chunk].

        Returns:
            Scales by which integers are still to be multiplied; None for changes.

        Raises:
            DamageError: A section makes no sense.
        """
        ...


@dataclass(frozen=True, eq=False)
class EachAlone:
    """Section decoder that takes one section after the other, where decoding several at once gains nothing.

    Args:
        read: Function that decodes one section.
    """

    read: Read

    def decode(
        self,
        start: int,  # noqa: ARG002
        stored: NDArray[np.uint8],
        sizes: Sequence[int],
        lengths: NDArray[np.intp],
        out: NDArray[np.float32],
    ) -> None:
        """Fill `out` with changes."""
        for row, size, values in zip(stored, sizes, out, strict=True):
            section = Section(row[:size])
            self.read(section, lengths, values)
            section.finish()


def write_payload(
    tensors: Sequence[TensorSpec],
    change: NDArray[np.float32],
    write: Write,
    *,
    block: int,
    settings: Mapping[str, Any],
) -> Encoded:
    """Encode all chunks of a flat change.

    Args:
        tensors: Shared tensors, in the order of the flat change.
        change: Flat change, float32 [entries].
        write: Function that encodes one chunk.
        block: Block size in entries; 0 for one block per chunk.
        settings: Header fields of the codec besides its name and version.
    """
    decoded = np.empty_like(change)
    sections = []
    start = 0
    for lengths in cut(tensors, block):
        stop = start + int(lengths.sum())
        sections.append(write(start, change[start:stop], lengths, decoded[start:stop]))
        start = stop
    index = np.array([len(section) for section in sections], "<u4").tobytes()
    payload = np.frombuffer(b"".join([index, *sections]), np.uint8)
    sums = [sum_of(np.frombuffer(section, np.uint8)) for section in sections]
    return Encoded(arrays={NAME: payload}, decoded=decoded, settings=settings, sums=sums)


@dataclass(frozen=True)
class PayloadDecoder:
    """Decoder of the chunks of one file.

    Args:
        file: Open file.
        tensors: Shared tensors, in the order of the flat change.
        ends: Offsets in the file where each section begins and the last one ends, int64 [chunks + 1].
        blocks: Block lengths in entries, by chunk.
        sections: Decoder of the sections.
        sums: Sums of the sections; None where the file states none.
    """

    file: TensorFile
    tensors: Sequence[TensorSpec]
    ends: NDArray[np.int64]
    blocks: Sequence[NDArray[np.intp]]
    sections: SectionDecoder
    sums: Sums | None = None

    def decode(self, start: int, out: NDArray[np.float32]) -> None:
        """Read and decode the section of the chunk."""
        try:
            scales = decode_together([self], start, out[np.newaxis])
        except DamageError as damage:
            raise self._refusal(start, start + len(out), damage) from damage
        if scales is not None:
            scales.multiply(out[np.newaxis])

    def check_sum(self, start: int, stop: int, found: np.uint64) -> None:
        """Compare the sum of a section with that which the file states, if it does.

        Raises:
            InvalidUpdateError: They differ.
        """
        if self.sums is not None and self.sums[start // codec.CHUNK_ENTRIES] != found:
            raise damaged(self.file, spelled_range(self.tensors, start, stop))

    def _refusal(self, start: int, stop: int, damage: DamageError) -> InvalidUpdateError:
        lengths = self.blocks[start // codec.CHUNK_ENTRIES]
        if damage.block is not None and len(lengths) > 1:
            start += int(lengths[: damage.block].sum())
            stop = start + 1
        which = spelled_range(self.tensors, start, stop)
        return InvalidUpdateError(f"{self.file.path}: {which}: expected {damage}; {self.file.remedy}", code="payload")


def decode_together(decoders: Sequence[PayloadDecoder], start: int, out: NDArray[np.float32]) -> BlockScales | None:
    """Decode the same chunk of files with equal section decoders, as `SectionDecoder.decode` does.

    Raises:
        DamageError: A section makes no sense.
        InvalidUpdateError: A file has become too short in the meantime, or a section has another sum than stated.
    """
    first, chunk = decoders[0], start // codec.CHUNK_ENTRIES
    bounds = [decoder.ends[chunk : chunk + 2].tolist() for decoder in decoders]
    sizes = [end - begin for begin, end in bounds]
    stored = scratch("sections", (len(decoders), -(-max(sizes) // 8) * 8))
    for decoder, row, size, (begin, _) in zip(decoders, stored, sizes, bounds, strict=True):
        decoder.file.read_into(begin, row[:size])
    for decoder, found in zip(decoders, sums_of_rows(stored, sizes), strict=True):
        decoder.check_sum(start, start + out.shape[1], found)
    return first.sections.decode(start, stored, sizes, first.blocks[chunk], out)


def open_payload(
    file: TensorFile, tensors: Sequence[TensorSpec], sections: SectionDecoder, *, block: int
) -> PayloadDecoder:
    """Decoder of a file whose payload and section lengths fit the tensors.

    Args:
        file: Open file.
        tensors: Shared tensors, in the order of the flat change.
        sections: Decoder of the sections.
        block: Block size in entries, where a section has at least 2 bytes per block; 0 for one block per chunk.

    Raises:
        InvalidUpdateError: The array is missing or not the only one, or the sections do not fill it.
    """
    entry = file.entries.get(NAME)
    if entry is None or file.entries.keys() - {NAME, STATISTICS} or entry.dtype != "uint8" or len(entry.shape) != 1:
        found = ", ".join(f"{name!r} {entry.dtype} {list(entry.shape)}" for name, entry in file.entries.items())
        raise InvalidUpdateError(
            f"{file.path}: expected one array {NAME!r} of uint8, found {found[:200] or 'none'}; {file.remedy}",
            code="payload",
        )
    # Before anything is allocated for the entries and blocks that a file only claims to have.
    entries = sum(tensor.size for tensor in tensors)
    chunks = -(-entries // codec.CHUNK_ENTRIES)
    required = 4 * chunks + (2 * -(-entries // block) if block else 0)
    if entry.nbytes < required:
        raise InvalidUpdateError(
            f"{file.path}: tensors {tensors[0].name!r} to {tensors[-1].name!r}: expected at least {required} bytes, "
            f"for the lengths of {chunks} chunks and what each block takes, found {entry.nbytes}; {file.remedy}",
            code="payload",
        )
    blocks = cut(tensors, block)
    lengths = np.empty(len(blocks), "<u4")
    file.read_into(entry.offset, lengths)
    ends = np.cumsum(np.r_[entry.offset + lengths.nbytes, lengths], dtype=np.int64)
    limits = np.array([8 * int(chunk.sum()) + 1024 for chunk in blocks])
    if np.any(lengths > limits) or ends[-1] != entry.offset + entry.nbytes:
        raise InvalidUpdateError(
            f"{file.path}: {NAME}: expected {len(blocks)} sections that fill {entry.nbytes} bytes, found lengths of "
            f"{ends[-1] - entry.offset} in all, the largest {lengths.max(initial=0)}; {file.remedy}",
            code="payload",
        )
    sums = read_sums(file, len(blocks) + (STATISTICS in file.entries))
    return PayloadDecoder(file, tensors, ends, blocks, sections, sums)
