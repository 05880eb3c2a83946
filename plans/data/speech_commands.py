"""Make `speech_commands.npz`: 40 spoken commands of 30 speakers as log-mel spectrograms, by speaker.

    x_train float32 [n, 40, 51], y_train int64 [n], speaker int64 [n]; x_test, y_test of six further speakers

The commands are the Arabic Speech Commands of Ghandoura, Hjabo and Al Dakkak (2021; CC BY 4.0, on GitHub as
abdulkaderghandoura/arabic-speech-commands-dataset): each of the speakers says each word ten times, a second long at
16 kHz. The six speakers of the authors' own test set are the test here as well; those of their training and
validation sets are the clients.

A spectrogram has 40 mel bands from 20 to 8,000 Hz over windows of 40 ms, one every 20 ms. Of its logarithms the mean of
each band over the second is taken off, which is much of what tells speakers and microphones apart, and the rest is
scaled by a constant, so that no client learns from another's data.

    python plans/data/speech_commands.py --source CHECKOUT
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from raw import output_option, source_option, write

from device_runtime.sources.sounds import read_sounds

RATE = 16_000
"""Samples per second of the recordings."""
WINDOW, HOP, BANDS = 640, 320, 40
"""Samples of a window, samples between the starts of two, and mel bands."""
LOWEST, HIGHEST = 20.0, 8_000.0
"""Range of the mel bands in Hz."""
DEVIATION = 4.0
"""Unit of the logarithms, about their standard deviation once they are centered."""


def mel(hertz: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pitch on the mel scale, as HTK defines it.

    >>> mel(np.array([0.0, 1000.0])).round().tolist()
    [0.0, 1000.0]
    """
    return np.asarray(2595 * np.log10(1 + hertz / 700))


def mel_filters() -> NDArray[np.float64]:
    """Triangular filters of the mel bands, float64 [BANDS, WINDOW // 2 + 1], each with a peak of at most 1."""
    edges = np.linspace(mel(np.array(LOWEST)), mel(np.array(HIGHEST)), BANDS + 2)
    pitch = mel(np.fft.rfftfreq(WINDOW, 1 / RATE))
    lower, peak, upper = (edges[k : k + BANDS, None] for k in range(3))
    return np.clip(np.minimum((pitch - lower) / (peak - lower), (upper - pitch) / (upper - peak)), 0, None)


def spectrograms(sounds: NDArray[np.float32]) -> NDArray[np.float32]:
    """Centered log-mel spectrograms, float32 [n, BANDS, 1 + samples // HOP], of float32 [n, samples] in [-1, 1].

    >>> spectrograms(np.zeros((1, RATE), np.float32)).shape
    (1, 40, 51)
    """
    padded = np.pad(sounds, ((0, 0), (WINDOW // 2, WINDOW // 2)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW, axis=1)[:, ::HOP]
    power = np.abs(np.fft.rfft(windows * np.hanning(WINDOW))) ** 2
    logarithms = np.log(power @ mel_filters().T + 1e-6)
    centered = logarithms - logarithms.mean(axis=1, keepdims=True)
    return (centered / DEVIATION).transpose(0, 2, 1).astype(np.float32)


def read_list(source: Path, name: str) -> list[tuple[Path, str]]:
    """Recordings of one of the authors' sets, and the word of each.

    Raises:
        ClickException: There is no such list in the folder.
    """
    if not (source / name).is_file():
        raise click.ClickException(
            f"{source}: expected a checkout of the Arabic Speech Commands with {name} in it, found none; "
            "pass it with --source"
        )
    with (source / name).open(encoding="utf-8", newline="") as lines:
        return [(source / row["file"], row["class"]) for row in csv.DictReader(lines)]


def recorded(rows: list[tuple[Path, str]], words: list[str]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Spectrograms, words by number, and speakers of recordings."""
    files = tuple(file for file, _ in rows)
    sounds = np.stack([sound[0] for sound in read_sounds(files, samples=RATE)])
    numbers = np.array([words.index(word) for _, word in rows], np.int64)
    speakers = np.array([int(file.name.split("_")[0]) for file in files], np.int64)
    return np.concatenate([spectrograms(part) for part in np.array_split(sounds, 64)]), numbers, speakers


@click.command()
@source_option("arabic_speech_commands")
@output_option("speech_commands.npz")
def main(source: Path, output: Path) -> None:
    """Turn the recordings into spectrograms and write them."""
    clients = read_list(source, "train.csv") + read_list(source, "val.csv")
    test = read_list(source, "test.csv")
    words = sorted({word for _, word in clients})
    x, y, speaker = recorded(clients, words)
    x_test, y_test, _ = recorded(test, words)
    write(output, {"x_train": x, "y_train": y, "speaker": speaker, "x_test": x_test, "y_test": y_test})


if __name__ == "__main__":
    main()
