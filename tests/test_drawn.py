"""Initial weights from a seed: the bytes of the specification, and next to none of them in the file."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import small_round
from test_update_kind import splitmix

from export import make_bundle
from fedpara_edge.errors import InputError, WrongBundleError
from fedpara_edge.formats.bundle import WEIGHTS
from fedpara_edge.formats.drawn import Drawn
from fedpara_edge.formats.recipe import Recipe
from fedpara_edge.formats.weights import Weights, read_weights, write_weights


def written(folder: Path) -> tuple[Weights, Weights]:
    """Weights before and after they were drawn anew."""
    layout = small_round.LAYOUT
    before = Weights(small_round.FINGERPRINT, 0, layout, small_round.random_tensors(layout, 1))
    return before, write_weights(folder / "w", before, Drawn(seed=7))


def test_what_is_drawn_is_that_of_the_specification(tmp_path: Path) -> None:
    before, after = written(tmp_path)
    assert read_weights(tmp_path / "w").base == after.base != before.base
    for name, tensor in before.tensors.items():
        found = after.tensors[name]
        if sum(size > 1 for size in tensor.shape) < 2:
            np.testing.assert_array_equal(found, tensor)
            continue
        seed = int.from_bytes(hashlib.sha256(f"fedpara-edge/drawn 7 {name}".encode()).digest()[:8], "little")
        stream = np.frombuffer(splitmix(seed, tensor.size // 4 + 1), "<u2")[: tensor.size].tolist()
        width = np.float32(np.sqrt(3 * np.mean(np.square(tensor, dtype=np.float64))))
        expected = [np.float32(width * np.float32((2 * x - 65535) / 65536)) for x in stream]
        assert found.ravel().tolist() == expected


def test_the_size_is_kept(tmp_path: Path) -> None:
    layout = small_round.layout_of(small_round.layer("fc", (100, 90), kind="dense"))
    before = Weights(small_round.FINGERPRINT, 0, layout, small_round.random_tensors(layout, 1, 0.3))
    after = write_weights(tmp_path / "w", before, Drawn(seed=1))
    assert np.std(after.tensors["fc.weight"]) == pytest.approx(0.3, rel=0.02)
    assert abs(np.mean(after.tensors["fc.weight"])) < 0.01
    assert (tmp_path / "w").stat().st_size < 2000
    other = write_weights(tmp_path / "other", before, Drawn(seed=2))
    assert not np.array_equal(after.tensors["fc.weight"], other.tensors["fc.weight"])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'\\"seed\\":7', b'\\"seed\\":{}'),
        (b'\\"widths\\"', b'\\"width!\\"'),
        (b'\\"widths\\":{\\"c', b'\\"widths\\":{\\"C'),
    ],
    ids=["seed", "widths", "name"],
)
def test_other_settings_are_refused(tmp_path: Path, before: bytes, after: bytes) -> None:
    written(tmp_path)
    content = (tmp_path / "w").read_bytes()
    assert before in content
    changed = content.replace(before, after)
    size = int.from_bytes(content[:8], "little") + len(after) - len(before)
    (tmp_path / "w").write_bytes(size.to_bytes(8, "little") + changed[8:])
    with pytest.raises(WrongBundleError, match="expected a seed and the widths of the tensors"):
        read_weights(tmp_path / "w")


def test_a_bundle_begins_with_next_to_nothing(tmp_path: Path) -> None:
    recipe = Recipe(name="mlp", kind="update", initial_codec="drawn", seed=3, engines=("onnxruntime",))
    bundle = make_bundle(recipe, tmp_path / "bundle").bundle
    assert bundle.file(WEIGHTS).stat().st_size < 6000
    weights = read_weights(bundle.file(WEIGHTS), bundle)
    assert np.std(weights.tensors["hidden.base"]) == pytest.approx(np.sqrt(2 / 784), rel=0.02)
    with pytest.raises(InputError, match="keeps the weights of pretrained, found drawn"):
        Recipe(name="mlp", initial_codec="drawn", pretrained=tmp_path / "w.pt")
