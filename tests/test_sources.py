"""Images, sounds and tables: the arrays that they become, the cache of these, and what does not fit."""

import csv
import json
import sys
import wave
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import soundfile
from PIL import Image
from pyarrow import parquet

from device_runtime.sources import ANY, Reading, Wanted, as_arrays, convert_source, is_source
from device_runtime.sources import cache as cache_module
from fedpara_edge.errors import InputError, OutputExistsError

GENERATOR = np.random.default_rng(0)


def arrays_of(path, wanted=ANY, **options):
    """Arrays of a source by name."""
    folder = as_arrays(path, Reading(**options), wanted)
    return {file.stem: np.load(file, allow_pickle=False) for file in folder.glob("*.npy")}


def refusal(path, wanted=ANY, **options):
    with pytest.raises(InputError) as caught:
        arrays_of(path, wanted, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save_images(folder, classes, shape=(6, 5, 3), suffix=".png"):
    """Images by class, two of each, and their pixels [N, ...] in the order of the classes and files."""
    pixels = []
    for name in sorted(classes):
        (folder / name).mkdir(parents=True)
        for number in range(2):
            pixels.append(GENERATOR.integers(0, 256, shape, np.uint8))
            Image.fromarray(pixels[-1]).save(folder / name / f"{number}{suffix}")
    return np.stack(pixels)


def save_wave(path, samples, *, width=2, rate=8000):
    """A sound of samples [T, channels] in [-1, 1)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = np.round(samples * (1 << (8 * width - 1))).astype(np.int64)
    data = (whole + 128).astype(np.uint8).tobytes() if width == 1 else whole.astype("<i8").tobytes()
    if width > 1:
        data = np.frombuffer(data, np.uint8).reshape(-1, 8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)


def save_table(path, **columns):
    """A table of columns, as its ending says."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table(columns), path)
        return path
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def test_images_keep_their_pixels_with_channels_first(tmp_path):
    pixels = save_images(tmp_path / "photos", ["dog", "cat", "owl"])
    arrays = arrays_of(tmp_path / "photos")
    np.testing.assert_array_equal(arrays["x"], pixels.transpose(0, 3, 1, 2), strict=True)
    assert arrays["y"].tolist() == [0, 0, 1, 1, 2, 2]
    assert arrays["y_names"].tolist() == ["cat", "dog", "owl"]
    assert arrays["files"].tolist()[:2] == [str(Path("cat", "0.png")), str(Path("cat", "1.png"))]


def test_gray_images_have_one_channel_and_colors_what_the_model_wants(tmp_path):
    gray = save_images(tmp_path / "gray", ["a"], (6, 5))
    np.testing.assert_array_equal(arrays_of(tmp_path / "gray")["x"][:, 0], gray)
    assert arrays_of(tmp_path / "gray", Wanted((3, 6, 5), "uint8"))["x"].shape == (2, 3, 6, 5)
    save_images(tmp_path / "colors", ["a"])
    assert arrays_of(tmp_path / "colors", Wanted((6, 5), "uint8"))["x"].shape == (2, 1, 6, 5)
    assert arrays_of(tmp_path / "colors", Wanted((4, 6, 5), "uint8"))["x"][:, 3].min() == 255


def test_images_are_resized_in_their_proportions(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 7:17] = 200
    (tmp_path / "photos" / "a").mkdir(parents=True)
    Image.fromarray(wide).save(tmp_path / "photos" / "a" / "0.png")
    assert (arrays_of(tmp_path / "photos", image_size=(4, 4))["x"] == 200).all()


def test_photos_are_turned_upright(tmp_path):
    (tmp_path / "photos" / "a").mkdir(parents=True)
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    exif = image.getexif()
    exif[274] = 6  # the camera was turned by a quarter
    image.save(tmp_path / "photos" / "a" / "0.png", exif=exif)
    assert arrays_of(tmp_path / "photos")["x"].shape == (1, 1, 6, 4)


def test_images_without_classes_have_no_labels(tmp_path):
    save_images(tmp_path, ["photos"])
    assert arrays_of(tmp_path / "photos").keys() == {"x", "files"}


def test_images_that_do_not_fit_are_named(tmp_path):
    photos = tmp_path / "photos"
    save_images(photos, ["a", "b"])
    Image.fromarray(np.zeros((7, 5, 3), np.uint8)).save(photos / "b" / "0.png")
    assert "b/0.png: expected an image of 6x5 as the first, found 7x5; resize all with --image-size 6,5" in refusal(
        photos
    )
    (photos / "b" / "0.png").write_bytes((photos / "b" / "1.png").read_bytes()[:60])
    assert "b/0.png: expected a whole image, found" in refusal(photos)
    Image.fromarray(np.zeros((6, 5), np.uint16)).save(photos / "b" / "0.png")
    assert "b/0.png: expected 8 bits a channel, found mode I;16 of more" in refusal(photos)


def test_a_folder_above_the_classes_is_refused(tmp_path):
    save_images(tmp_path / "data" / "train", ["a", "b"])
    assert "expected a folder for each class with its files in it, found train/a/0.png" in refusal(tmp_path / "data")


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_sounds_keep_their_samples(tmp_path, width, channels):
    samples = np.round(GENERATOR.uniform(-1, 1, (50, channels)) * 100) / 128
    save_wave(tmp_path / "tones" / "a" / "0.wav", samples, width=width)
    arrays = arrays_of(tmp_path / "tones")
    np.testing.assert_array_equal(arrays["x"], samples.T[None].astype(np.float32), strict=True)
    assert arrays["y_names"].tolist() == ["a"]


@pytest.mark.parametrize("kind", ["float.wav", "lossless.flac"])
def test_other_sounds_are_read_with_soundfile(tmp_path, kind):
    samples = np.round(GENERATOR.uniform(-1, 1, 64) * 100) / 128
    (tmp_path / "tones" / "a").mkdir(parents=True)
    subtype = "FLOAT" if kind.endswith("wav") else None
    soundfile.write(tmp_path / "tones" / "a" / kind, samples, 8000, subtype=subtype)
    np.testing.assert_array_equal(arrays_of(tmp_path / "tones")["x"][0, 0], samples.astype(np.float32))


def test_sounds_are_cut_and_padded_when_asked(tmp_path):
    tones = tmp_path / "tones"
    for number, length in enumerate((4, 6)):
        save_wave(tones / "a" / f"{number}.wav", np.full((length, 1), 0.5))
    assert "expected 4 samples as in the first, found 6; cut and pad all with --audio-samples 4" in refusal(tones)
    assert arrays_of(tones, audio_samples=5)["x"][:, 0].tolist() == [[0.5] * 4 + [0], [0.5] * 5]
    save_wave(tones / "a" / "2.wav", np.zeros((4, 1)), rate=16000)
    assert "expected 8000 samples a second in 1 channels as in the first, found 16000" in refusal(
        tones, audio_samples=4
    )
    (tones / "a" / "2.wav").write_bytes(b"RIFF")
    assert "2.wav: expected a whole sound" in refusal(tones, audio_samples=4)


COLUMNS = {
    "person": ["ann", "ann", "ann", "bob", "bob", "bob"],
    "ax": [0.5, 1.5, 2.5, 3.5, 4.5, 5.5],
    "count": [1, 2, 3, 4, 5, 6],
    "label": ["walk", "run", "walk", "run", "run", "sit"],
}


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.parquet"])
def test_tables_become_rows_of_numbers(tmp_path, name):
    arrays = arrays_of(save_table(tmp_path / name, **COLUMNS))
    expected = np.array([COLUMNS["ax"], COLUMNS["count"]], np.float32).T
    np.testing.assert_array_equal(arrays["x"], expected, strict=True)
    assert arrays["y_names"][arrays["y"]].tolist() == COLUMNS["label"]
    assert arrays["person"].tolist() == COLUMNS["person"]
    np.testing.assert_array_equal(arrays["count"], np.array(COLUMNS["count"]), strict=True)


@pytest.mark.parametrize("name", ["d.csv", "d.parquet"])
def test_columns_are_chosen(tmp_path, name):
    path = save_table(tmp_path / name, **COLUMNS)
    arrays = arrays_of(path, label_column=("ax", "count"), column=("count",))
    assert arrays["x"].tolist() == [[value] for value in COLUMNS["count"]]
    np.testing.assert_array_equal(arrays["y"][:, 0], np.float32(COLUMNS["ax"]), strict=True)
    assert arrays_of(path, column=("count",), label_column=("ax",))["y"].dtype == np.float32
    tokens = arrays_of(path, Wanted((1,), "int64"), column=("count",))
    np.testing.assert_array_equal(tokens["x"][:, 0], COLUMNS["count"], strict=False)
    assert tokens["x"].dtype == np.int64
    assert "expected a column 'az', found 'person', 'ax', 'count', 'label'; name one of them" in refusal(
        path, column=("az",)
    )
    without = save_table(tmp_path / f"without-{name}", ax=[1.0], ay=[2.0])
    assert "y" not in arrays_of(without)


def test_windows_do_not_mix_owners(tmp_path):
    path = save_table(tmp_path / "d.csv", **COLUMNS)
    arrays = arrays_of(path, window=2, stride=1, window_key="person", column=("ax", "count"))
    assert arrays["x"][:, :, 1].tolist() == [[1, 2], [2, 3], [4, 5], [5, 6]]
    assert arrays["person"].tolist() == ["ann", "ann", "bob", "bob"]
    assert arrays["y_names"][arrays["y"]].tolist() == ["walk", "run", "run", "run"]
    assert arrays_of(path, window=2, column=("ax", "count"))["x"].shape == (3, 2, 2)
    wanted = Wanted((2, 3), "float32")
    turned = arrays_of(path, wanted, window=3, column=("ax", "count"))
    assert turned["x"].shape == (2, 2, 3)
    assert turned["x"][0, 1].tolist() == [1, 2, 3]
    assert "expected at least 4 rows for a window" in refusal(path, window=4, window_key="person", column=("ax",))


def test_a_window_has_the_label_of_most_of_its_rows(tmp_path):
    path = save_table(tmp_path / "d.csv", a=[0.0] * 6, label=["s", "r", "r", "w", "s", "w"])
    arrays = arrays_of(path, window=3)
    assert arrays["y_names"][arrays["y"]].tolist() == ["r", "w"]
    numbers = save_table(tmp_path / "n.csv", a=[0.0] * 4, label=[0.5, 1.5, 2.5, 4.5])
    assert arrays_of(numbers, window=2)["y"].tolist() == [1.0, 3.5]


def test_tables_that_do_not_fit_are_told_where(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("a,b\n1,2\n3\n")
    assert "line 3: expected 2 cells as in the first line, found 1" in refusal(path)
    path.write_text("a,b\n1,2\n3,\n")
    assert "column 'b', row 1: expected a number, found ''" in refusal(path, column=("b",))
    path.write_text("a,b\n1,2\n3,nan\n")
    assert "column 'b', row 1: expected a finite number, found nan" in refusal(path)
    path.write_text("a,a\n1,2\n")
    assert "expected a first line with a name for each column" in refusal(path)
    path.write_text("a\n")
    assert "expected names of columns and at least one row, found none" in refusal(path)
    path.write_bytes(b"a\n\xff\xfe\n")
    assert "expected a table of text in UTF-8" in refusal(path)
    table = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.table({"a": [1.0, None]}), table)
    assert "column 'a', row 1: expected a value, found none" in refusal(table)
    parquet.write_table(pyarrow.table({"a": [[1], [2]]}), table)
    assert "column 'a': expected numbers or text, found list" in refusal(table)
    table.write_bytes(table.read_bytes()[:-9])
    assert "expected a Parquet table, found" in refusal(table)


def test_large_tables_are_read_in_pieces(tmp_path):
    rows = 10_000
    path = save_table(tmp_path / "d.csv", a=range(rows), label=["x"] * (rows - 1) + ["longer"])
    arrays = arrays_of(path)
    np.testing.assert_array_equal(arrays["x"][:, 0], np.arange(rows))
    assert arrays["label"][-1] == "longer"
    mixed = save_table(tmp_path / "m.csv", a=[*range(rows), 0.5], b=[*range(rows), "text"])
    assert arrays_of(mixed)["a"].dtype == np.float32
    assert arrays_of(mixed)["b"][7] == "7"


def test_sources_are_converted_once(tmp_path, capsys):
    photos = tmp_path / "photos"
    save_images(photos, ["a", "b"])
    first = as_arrays(photos)
    assert "photos: converted to x [4, 3, 6, 5], classes a, b" in capsys.readouterr().err
    assert as_arrays(photos) == first
    assert capsys.readouterr().err == ""
    assert as_arrays(photos, Reading(image_size=(3, 3))) != first
    assert first.is_dir()


def test_other_content_is_converted_anew_and_the_former_removed(tmp_path, monkeypatch):
    path = save_table(tmp_path / "d.csv", a=[1, 2])
    first = as_arrays(path)
    hashed = []
    monkeypatch.setattr(cache_module, "sha256_of", lambda file: hashed.append(file) or "0")
    assert as_arrays(path) == first
    assert hashed == []
    monkeypatch.undo()
    path.write_text("a\n3\n4\n5\n")
    second = as_arrays(path)
    assert np.load(second / "x.npy").tolist() == [[3], [4], [5]]
    assert not first.exists()


def test_a_copy_with_another_time_is_not_converted_again(tmp_path, capsys):
    path = save_table(tmp_path / "d.csv", a=[1, 2])
    first = as_arrays(path)
    capsys.readouterr()
    path.touch()
    assert as_arrays(path) == first
    assert capsys.readouterr().err == ""


def test_a_conversion_that_fails_leaves_nothing(tmp_path):
    photos = tmp_path / "photos"
    save_images(photos, ["a", "b"])
    (photos / "b" / "1.png").write_bytes(b"")
    refusal(photos)
    assert list((tmp_path / ".photos.fedpara-edge").glob("*")) == []
    with pytest.raises(InputError):
        convert_source(photos, tmp_path / "arrays")
    assert not (tmp_path / "arrays").exists()


def test_the_cache_is_the_users_where_the_source_can_only_be_read(tmp_path, monkeypatch):
    path = save_table(tmp_path / "d.csv", a=[1, 2])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache_module.os, "access", lambda *_: False)
    assert as_arrays(path).is_relative_to(tmp_path / "cache" / "fedpara-edge")


def test_a_record_that_is_damaged_costs_a_hash_and_no_more(tmp_path):
    path = save_table(tmp_path / "d.csv", a=[1, 2])
    entry = as_arrays(path)
    for damaged in ("", "{", json.dumps([1])):
        (entry / "source.json").write_text(damaged)
        assert as_arrays(path) == entry


def test_arrays_are_no_source(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros(2))
    np.save(tmp_path / "x.npy", np.zeros(2))
    for path in (tmp_path / "d.npz", tmp_path, tmp_path / "missing.csv"):
        assert not is_source(path)
        assert as_arrays(path) == path
    with pytest.raises(InputError, match=r"d\.npz: expected a table .* or a folder with images or sounds by class"):
        convert_source(tmp_path / "d.npz", tmp_path / "arrays")


def test_an_option_without_effect_is_refused(tmp_path):
    path = save_table(tmp_path / "d.csv", a=[1, 2])
    assert "image_size: expected for another kind of data, found for" in refusal(path, image_size=(3, 3))
    with pytest.raises(InputError, match="window_key: expected with a window, found 'a' without"):
        Reading(window_key="a")


def test_an_existing_folder_is_kept(tmp_path):
    path = save_table(tmp_path / "d.csv", a=[1, 2])
    (tmp_path / "arrays").mkdir()
    with pytest.raises(OutputExistsError):
        convert_source(path, tmp_path / "arrays")
    convert_source(path, tmp_path / "arrays", overwrite=True)
    assert np.load(tmp_path / "arrays" / "x.npy").shape == (2, 1)


@pytest.mark.parametrize(
    ("module", "make", "words"),
    [
        ("PIL", lambda folder: save_images(folder / "d", ["a"]), "images: expected Pillow, found none"),
        ("pyarrow", lambda folder: save_table(folder / "d.parquet", a=[1]), "Parquet: expected pyarrow, found none"),
        ("soundfile", lambda folder: _empty(folder / "d" / "a" / "0.flac"), "or soundfile to read others, found none"),
    ],
)
def test_what_is_missing_is_named_with_the_line_to_type(tmp_path, monkeypatch, module, make, words):
    make(tmp_path)
    (path,) = tmp_path.iterdir()
    monkeypatch.setitem(sys.modules, module, None)
    message = refusal(path)
    assert words in message
    assert "[data]" in message
    assert "fedpara-edge data convert" in message


def _empty(path):
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
