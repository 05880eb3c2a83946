"""Sounds: float32 [channels, samples] in [-1, 1]; PCM in WAV files with the standard library, others with soundfile."""

from __future__ import annotations

import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.errors import InputError
from fedpara_edge.installation import install_line

SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3", ".aiff"})
Sound = tuple[int, NDArray[np.float32]]
"""Samples a second, and the samples [channels, T]."""


def read_sounds(files: tuple[Path, ...], *, samples: int | None) -> Iterator[NDArray[np.float32]]:
    """Sounds, float32 [channels, samples] of the same shape.

    Args:
        files: Files, at least one.
        samples: Samples of each, of which longer ones lose the end and shorter ones get zeros; None for those of the
            first, which all must have.

    Raises:
        InputError: A file is damaged, or of another rate, number of channels or length than the first; or soundfile is
            needed and not installed.
    """
    first: tuple[int, int] | None = None
    length = samples
    for file in files:
        rate, sound = _read(file)
        first, length = first or (rate, len(sound)), length or sound.shape[1]
        if (rate, len(sound)) != first:
            raise InputError(
                f"{file}: expected {first[0]} samples a second in {first[1]} channels as in the first, found {rate} in "
                f"{len(sound)}; resample it (sox, ffmpeg) to the rate that the model was made for"
            )
        if sound.shape[1] != length and samples is None:
            raise InputError(
                f"{file}: expected {length} samples as in the first, found {sound.shape[1]}; cut and pad all with "
                f"--audio-samples {length} or another number"
            )
        yield sound if sound.shape[1] == length else _fitted(sound, length)


def _fitted(sound: NDArray[np.float32], samples: int) -> NDArray[np.float32]:
    fitted = np.zeros((len(sound), samples), np.float32)
    kept = min(samples, sound.shape[1])
    fitted[:, :kept] = sound[:, :kept]
    return fitted


def _read(file: Path) -> Sound:
    if file.suffix.lower() == ".wav":
        try:
            return _read_pcm(file)
        except wave.Error as error:
            if "unknown format" not in str(error):
                raise _damaged(file, error) from error
        except (OSError, EOFError, ValueError) as error:
            raise _damaged(file, error) from error
    soundfile = _soundfile(file)
    try:
        found, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:
        raise _damaged(file, error) from error
    return int(rate), np.ascontiguousarray(found.T)


def _read_pcm(file: Path) -> Sound:
    with wave.open(str(file), "rb") as stream:
        width, channels, rate = stream.getsampwidth(), stream.getnchannels(), stream.getframerate()
        data = stream.readframes(stream.getnframes())
    if not data or len(data) % (width * channels):
        raise ValueError("no whole samples")
    return rate, np.ascontiguousarray(_as_numbers(data, width).reshape(-1, channels).T)


def _as_numbers(data: bytes, width: int) -> NDArray[np.float32]:
    """Samples in [-1, 1): unsigned in one byte, signed in two to four, the least significant byte first.

    >>> _as_numbers(bytes([0, 128, 255]), 1).tolist()
    [-1.0, 0.0, 0.9921875]
    >>> _as_numbers(bytes([0, 0, 192, 0, 0, 64]), 3).tolist()
    [-0.5, 0.5]
    """
    if width == 1:
        return (np.frombuffer(data, np.uint8).astype(np.float32) - np.float32(128)) / np.float32(128)
    if width == 3:
        padded = np.zeros((len(data) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        data, width = padded.tobytes(), 4
    samples: NDArray[np.float64] = np.frombuffer(data, f"<i{width}") / np.float64(1 << (8 * width - 1))
    return samples.astype(np.float32)


def _damaged(file: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{file}: expected a whole sound, found {reason}; replace or remove it")


def _soundfile(file: Path) -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise InputError(
            f"{file}: expected PCM in a WAV file, or soundfile to read others, found none ({error}); type: "
            f"{install_line('data')}, or convert it elsewhere with fedpara-edge data convert"
        ) from error
    return soundfile
