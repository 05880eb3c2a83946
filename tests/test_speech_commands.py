"""Spoken commands become the spectrograms of the plan: a tone is in its band, and clients are speakers."""

import runpy
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parent.parent / "plans" / "data" / "speech_commands.py"
RATE = 16_000


def tone(hertz: float) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(RATE) / RATE)).astype(np.float32)


def record(file: Path, sound: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(file), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(RATE)
        stream.writeframes((sound * 32767).astype("<i2").tobytes())


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Two words of three speakers, one in each of the authors' sets; one recording is too short."""
    words = {"left": 500.0, "right": 3000.0}
    for speaker, name in enumerate(("train", "val", "test"), start=1):
        lines = ["file,class"]
        for word, hertz in words.items():
            file = f"dataset/{word}/{speaker:08}_NO_01.wav"
            record(tmp_path / file, tone(hertz)[: RATE // 2 if name == "val" else RATE])
            lines.append(f"{file},{word}")
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    return tmp_path


def test_a_tone_that_begins_is_in_its_band(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = runpy.run_path(str(SCRIPT))
    edges = np.linspace(*script["mel"](np.array([20.0, 8000.0])), 42)
    noise = np.random.default_rng(0).normal(0, 0.01, RATE).astype(np.float32)
    late = (np.arange(RATE) > RATE // 2).astype(np.float32)
    for hertz in (300.0, 1000.0, 5000.0):
        found = script["spectrograms"]((noise + late * tone(hertz))[None])[0]
        band = (found[:, 30:].mean(axis=1) - found[:, :20].mean(axis=1)).argmax()
        assert edges[band] < script["mel"](np.array(hertz)) < edges[band + 2], "the band that gains most"
        np.testing.assert_allclose(found.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(script["spectrograms"](np.zeros((1, RATE), np.float32)), 0, atol=1e-6)


def test_clients_are_the_speakers_and_the_test_is_of_others(recordings: Path, tmp_path: Path) -> None:
    out = tmp_path / "made.npz"
    command = [sys.executable, SCRIPT, "-o", out, "--source"]
    done = subprocess.run([*command, recordings], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(out) as made:
        assert made["x_train"].shape == (4, 40, 51)
        assert made["x_train"].dtype == np.float32
        assert made["speaker"].tolist() == [1, 1, 2, 2]
        assert made["y_train"].tolist() == [0, 1, 0, 1]
        assert made["x_test"].shape == (2, 40, 51)
        whole, short = made["x_train"][[0, 2]].max(axis=1)
        assert short[:20].min() > short[30:].max() + 1, "silence after the end"
        assert abs(whole[:20].mean() - whole[30:].mean()) < 0.1
    missing = subprocess.run([*command, tmp_path / "none"], capture_output=True, text=True, check=False)
    assert missing.returncode == 1
    assert missing.stderr.startswith(f"Error: {tmp_path / 'none'}: expected a checkout of the Arabic Speech Commands")
