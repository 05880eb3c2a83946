"""The phone's modules and the library agree on the test vectors that the library writes (`phone_vectors`)."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from norms import relative_error
from numpy.typing import NDArray
from phone_tools import PHONE, WEB, node, run_node
from phone_vectors import STATEFUL, STATELESS, write_vectors

from device_runtime.state import DeviceState
from fedpara_edge.codecs.codec import in_order
from fedpara_edge.errors import InvalidUpdateError, TrustError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.bundle import open_bundle
from fedpara_edge.formats.encoded import read_change
from fedpara_edge.formats.update import open_update
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.storage.atomic import sha256_of
from fedpara_edge.storage.tensorfile import TensorFile
from fedpara_edge.trust.envelope import Statement, envelope_path, read_envelope, verified_statement
from fedpara_edge.trust.keys import parse_public

pytestmark = pytest.mark.slow

FIELDS = {"orders": "order", "step_seeds": "is", "micro_batch_seeds": "is", "random_floats": "values"}
TOLERANCE = 1e-5  # of a call with a smooth model, whose engines round differently
CALLS = (*STATEFUL, *STATELESS)
UPDATE = "fedpara-edge/update"


class Both(NamedTuple):
    """Folders of the vectors and of what the phone's modules made of them."""

    vectors: Path
    answers: Path

    def named(self, kind: str) -> list[tuple[dict[str, Any], Any]]:
        """Vectors of a kind, each with the answer."""
        vectors = json.loads((self.vectors / "vectors.json").read_text(encoding="utf-8"))
        answers = json.loads((self.answers / "answers.json").read_text(encoding="utf-8"))
        return list(zip(vectors[kind], answers[kind], strict=True))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    node()
    folder = tmp_path_factory.mktemp("phone")
    both = Both(folder / "vectors", folder / "answers")
    both.answers.mkdir()
    write_vectors(both.vectors)
    run_node(PHONE / "answers.mjs", both.vectors, both.answers)
    return both


def test_the_types_are_right() -> None:
    run_node(WEB / "node_modules" / "typescript" / "bin" / "tsc", "-p", WEB)


@pytest.mark.parametrize("kind", FIELDS)
def test_orders_and_seeds_are_those_of_numpy(kind: str, both: Both) -> None:
    pairs = both.named(kind)
    assert [answer for _, answer in pairs] == [vector[FIELDS[kind]] for vector, _ in pairs]


def test_learning_rates_are_equal_in_float32(both: Both) -> None:
    for vector, answer in both.named("rates"):
        assert np.array_equal(np.float32(answer["rates"]), np.float32(vector["rates"]))
        assert answer["sum"] == pytest.approx(vector["sum"], rel=1e-15)
        if "lr_decay" not in vector["settings"] and vector["settings"].get("schedule") != "cosine":
            assert answer["sum"] == vector["sum"]  # no powers and no cosines, in whose last digit platforms differ


def test_labels_get_the_same_numbers_and_wrong_data_a_sentence(both: Both) -> None:
    pairs = both.named("data")
    assert [answer["labels"] for _, answer in pairs] == [vector["labels"] for vector, _ in pairs]
    errors = [answer["error"] for vector, answer in pairs if vector["labels"] is None]
    assert len(errors) >= 10
    assert all("expected" in error and "found" in error and "; " in error for error in errors)


def test_every_codec_stores_what_the_library_stores(both: Both) -> None:
    """Decoded changes are equal, and bytes where there is no Zstandard frame, of which only the content is."""
    for vector, answer in both.named("codecs"):
        if vector["update"] is None:
            assert "the training diverged" in answer["error"]
            continue
        layout = Layout.from_json({"layers": [], "tensors": vector["tensors"]})
        decoded = (both.vectors / vector["decoded"]).read_bytes()
        for name in (vector["decoded"], f"{vector['decoded']}-by-itself"):
            assert (both.answers / name).read_bytes() == decoded, vector
        expected, found = (folder / vector["update"] for folder in both)
        with TensorFile(found, format=UPDATE, error=InvalidUpdateError) as file:
            change = read_change(file, in_order(layout.shared))
        assert change.tobytes() == decoded, vector
        if vector["codec"].startswith(("uniform", "float32")) or "entropy=0" in vector["codec"]:
            assert found.read_bytes() == expected.read_bytes(), vector
        assert found.stat().st_size <= 1.002 * expected.stat().st_size, vector


def test_frames_without_references_are_read_by_zstandard() -> None:
    found = json.loads(run_node(PHONE / "frames.mjs"))
    assert found["wrong"] == []
    assert found["frames"] > 10 * found["none"] > 0


def test_encoded_weights_and_changes_lead_to_the_same_base(both: Both) -> None:
    pairs = both.named("weights")
    assert {len(vector["results"]) for vector, _ in pairs} == {0, 3, 4}
    for vector, answer in pairs:
        last = [vector["base"], *vector["results"]][-1]
        assert answer == {"base": vector["base"], "results": vector["results"], "whole": last}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_the_same_update(name: str, both: Both) -> None:
    ((vector, _),) = (pair for pair in both.named("calls") if pair[0]["name"] == name)
    bundle = open_bundle(both.vectors / vector["bundle"])
    weights = read_weights(both.vectors / vector["weights"], bundle)
    expected, found = (open_update(folder / vector["update"], weights) for folder in both)
    check_header(found.file.header, expected.file.header)
    changes = [read_change(each.file, in_order(weights.layout.shared)) for each in (found, expected)]
    for each in (found, expected):
        each.close()
    if name in STATELESS:
        assert np.mean(changes[0] != changes[1]) <= 0.01  # an entry in a hundred is rounded to the other side
        return
    kept = [groups_after(folder / vector["after"]) for folder in (both.answers, both.vectors)]
    assert kept[0].keys() == kept[1].keys()
    for group in kept[0].keys() - {"residual"}:
        assert relative_error(*(each[group] for each in kept)) < TOLERANCE, group
    # A rounding to the other side is in the residual as well.
    sent_and_left = [change + each.get("residual", 0) for change, each in zip(changes, kept, strict=True)]
    assert relative_error(*sent_and_left) < TOLERANCE


def test_algorithms_that_keep_something_of_updates_are_refused(both: Both) -> None:
    pairs = both.named("refusals")
    assert len(pairs) == 2
    for vector, answer in pairs:
        name = vector["settings"]["algorithm"]
        assert answer.startswith("algorithm: expected one that keeps nothing from round to round for a model of kind")
        assert answer.endswith(f"found {name}")


def test_signatures_are_those_of_the_library_which_verifies_them(both: Both, tmp_path: Path) -> None:
    keys = [parse_public(vector["public"]) for vector, _ in both.named("signatures")]
    for number, (vector, answer) in enumerate(both.named("signatures")):
        assert answer["public"] == vector["public"]
        content = base64.b64decode(answer["envelope"], validate=True)
        assert json.loads(content) == vector["envelope"]
        update = tmp_path / f"{number}.safetensors"
        shutil.copy(both.vectors / vector["update"], update)
        envelope_path(update).write_bytes(content)
        envelope = read_envelope(update)
        statement = verified_statement(envelope, keys[number], update, Statement)
        assert (statement.run, statement.sha256) == (vector["run"], sha256_of(update))
        with pytest.raises(TrustError, match="expected a signature by the listed key, found a forged one"):
            verified_statement(envelope, keys[number - 2], update, Statement)


def test_a_call_killed_at_any_write_goes_on_to_the_same_update_and_state(both: Both, tmp_path: Path) -> None:
    found = json.loads(run_node(PHONE / "kills.mjs", both.vectors, "adamw", tmp_path))
    whole = found["whole"]
    assert [each["digests"] for each in [*found["torn"], found["again"]]] == [whole] * (len(found["torn"]) + 1)
    resumed = {each["resumedFromStep"] for each in found["torn"]}
    assert resumed == {0, 1, 2, 3}  # of 3 steps: begun again, gone on with, and ended
    ((vector, _),) = (pair for pair in both.named("calls") if pair[0]["name"] == "adamw")
    bundle = open_bundle(both.vectors / vector["bundle"])
    kept = DeviceState(tmp_path / "whole", bundle.manifest.fingerprint)  # the files are those of a Python device
    committed = kept.committed()
    assert committed is not None
    assert committed.after.keys() == {"personal", "residual", "dynamic"}
    assert kept.client() == "device"


def test_damaged_files_are_refused_in_a_sentence(both: Both) -> None:
    """Whatever a file is made of; those whose content has a digest are refused whatever changed in them."""
    found = json.loads(run_node(PHONE / "hostile.mjs", both.vectors))
    assert {kind: counts["errors"] for kind, counts in found.items()} == {kind: [] for kind in found}
    for kind in ("change", "local.safetensors", "train_step.onnx"):
        assert found[kind]["refused"] > 0.95 * found[kind]["files"]  # some bytes were changed to what they were
    assert all(counts["refused"] > 0.2 * counts["files"] for counts in found.values())


def check_header(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Everything is equal, but that losses and the change are rounded otherwise, and so its sums are others."""
    rounded = {"metrics": None, "sums": None, "digest": None}
    assert {**found, **rounded} == {**expected, **rounded}
    losses = {"loss", "first_epoch_loss"} & expected["metrics"].keys()
    assert found["metrics"] == expected["metrics"] | {name: found["metrics"][name] for name in losses}
    for name in losses:
        assert found["metrics"][name] == pytest.approx(expected["metrics"][name], rel=TOLERANCE)


def groups_after(path: Path) -> dict[str, NDArray[np.float32]]:
    """What a device keeps after a call: a vector of all tensors of each group, by name."""
    groups: dict[str, list[NDArray[np.float32]]] = {}
    with TensorFile(path, format="fedpara-edge/device-state", error=InvalidUpdateError) as file:
        for name in sorted(file.entries):
            moment, group, _ = name.split("/", 2)
            if moment == "after":
                groups.setdefault(group, []).append(file.read(name).reshape(-1))
    return {group: np.concatenate(tensors) for group, tensors in groups.items()}
