"""The kind of a foreign file, told from its first bytes, for the message that refuses it.

A safetensors file starts with the length of its table, a little-endian uint64 of at most `tensortable.MAX_TABLE_BYTES`.
The first eight bytes of the kinds told apart here make a far larger number, so none of our files, cut short or not, is
taken for one of them.
"""

from __future__ import annotations

from codecs import getincrementaldecoder

HEAD_BYTES = 512

_ZIP, _NPY = b"PK\x03\x04", b"\x93NUMPY"
_OLD_PYTORCH = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_TEXTS = {".json": "a JSON file", ".toml": "a TOML file"}


def recognize(head: bytes, suffix: str) -> str | None:
    """Kind of a file that is none of ours, to follow "found" in a message; None where it is not certain.

    Args:
        head: First `HEAD_BYTES` bytes of the file, or all that it has.
        suffix: Ending of the file's name, with its dot.

    >>> recognize(b"PK" + bytes([3, 4, *[0] * 22, 5, 0, 0, 0]) + b"x.npy", "")
    'an .npz archive of numpy arrays'
    >>> recognize(b'{"model": "mlp"}', ".json"), recognize(b"label,pixel\\n", ".csv")
    ('a JSON file', 'a text file')
    >>> recognize(b"\\x10" + bytes(7) + b'{"a":', ".safetensors") is None
    True
    """
    if head.startswith(_ZIP):
        return _archive(head)
    if head.startswith(_NPY):
        return "a numpy array (.npy)"
    if head.startswith(_OLD_PYTORCH):
        return "a PyTorch file"
    if suffix == ".onnx" and _is_onnx(head):
        return "an ONNX model"
    return _TEXTS.get(suffix, "a text file") if _is_text(head) else None


def _archive(head: bytes) -> str:
    """Kind of a zip archive, by the name of its first member (PKWARE's APPNOTE.TXT, section 4.3.7)."""
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if name.endswith(b".npy"):
        return "an .npz archive of numpy arrays"
    return "a PyTorch file" if name.endswith(b"/data.pkl") else "a zip archive"


def _is_onnx(head: bytes) -> bool:
    """Whether the fields of an ONNX model begin: 1, a version, then 2, the producer's name, or 7, the graph."""
    return len(head) > 2 and head[0] == 0x08 and head[1] < 0x80 and head[2] in (0x12, 0x3A)


def _is_text(head: bytes) -> bool:
    try:
        text = getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return len(head) >= 8 and all(character.isprintable() or character in "\t\n\f\r" for character in text)
