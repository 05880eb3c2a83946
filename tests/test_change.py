"""Published changes: the server and every device hold the same bits, late or not, and nothing altered gets through."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_round
from command_line import Command
from encoded import EVERY
from norms import norm
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fedpara_edge.codecs import find_encoder
from fedpara_edge.errors import DivergedError, FedparaError, InputError, InvalidUpdateError, WrongBundleError
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.change import Published, apply_change, publish_change
from fedpara_edge.formats.weights import Weights, read_weights, write_weights

LAYOUT = Layout(
    (), tuple(small_round.tensor(f"t{n}", shape) for n, shape in enumerate([(300, 250), (7,), (), (40, 3)]))
)


def next_target(weights: Weights, *, deviation: float = 0.1) -> Weights:
    """What an aggregation would make of them."""
    step = small_round.random_tensors(weights.layout, weights.round + 100, deviation)
    moved = {name: tensor + step[name] for name, tensor in weights.tensors.items()}
    return replace(weights, round=weights.round + 1, tensors=moved)


class Server:
    """Rounds of a server: the weights of each, and the changes between them."""

    def __init__(self, folder: Path, codec: str, layout: Layout = LAYOUT) -> None:
        self.folder, self.encoder = folder, find_encoder(codec)
        self.weights = [small_round.start_round(folder, layout, number=0)]
        self.changes: list[Path] = []
        self.wanted = small_round.flat(self.weights[0].tensors)
        self.residual: Any = None

    def publish(self) -> Published:
        target = next_target(self.weights[-1])
        path = self.folder / f"change-{target.round}"
        self.wanted = self.wanted + small_round.flat(target.tensors) - small_round.flat(self.weights[-1].tensors)
        published = publish_change(path, self.weights[-1], target, self.encoder, residual=self.residual)
        self.residual = published.residual
        self.weights.append(published.weights)
        self.changes.append(path)
        return published


def bits(weights: Weights) -> dict[str, list[int]]:
    return {name: tensor.view(np.uint32).reshape(-1).tolist() for name, tensor in weights.tensors.items()}


@pytest.mark.parametrize("codec", EVERY)
def test_devices_hold_the_bits_of_the_server_however_late_they_come(tmp_path: Path, codec: str) -> None:
    server = Server(tmp_path, codec)
    for _ in range(4):
        published = server.publish()
        assert published.bytes == server.changes[-1].stat().st_size
    for missed in range(1, 5):
        device = server.weights[4 - missed]
        for change in server.changes[4 - missed :]:
            device = apply_change(device, change)
        assert device.base == server.weights[4].base
        assert device.round == 4
        assert bits(device) == bits(server.weights[4])
    # What was asked for and has not been sent is the residual, but for a rounding of float32 at each of the steps.
    left = small_round.flat(server.residual)
    sent = small_round.flat(server.weights[4].tensors)
    scale = max(np.abs(sent).max(), np.abs(left).max())
    np.testing.assert_allclose(sent + left, server.wanted, rtol=0, atol=16 * 2.0**-24 * scale)
    if codec == "float32":
        assert not left.any()


def test_weights_with_minus_zero_and_subnormals_come_out_bit_for_bit(tmp_path: Path) -> None:
    base = small_round.start_round(tmp_path, LAYOUT, number=0)
    base.tensors["t1"][:] = [-0.0, 0.0, 1e-40, -1e-40, 3e38, -3e38, 1.0]
    for codec in EVERY:
        target = next_target(base)
        target.tensors["t1"][:] = [0.0, -0.0, 0.0, 1e-40, 3e38, -3e38, 1.0]
        published = publish_change(tmp_path / "change", base, target, find_encoder(codec), residual=None)
        assert bits(apply_change(base, tmp_path / "change")) == bits(published.weights)


def test_golden_header(tmp_path: Path) -> None:
    server = Server(tmp_path, "uniform:step=2")
    server.publish()
    with safe_open(server.changes[0], "numpy") as file:
        header = json.loads(file.metadata()["fedpara_edge"])
        assert list(file.keys()) == ["payload"]
    assert header == {
        "format": "fedpara-edge/change",
        "version": 1,
        "fingerprint": small_round.FINGERPRINT,
        "round": 1,
        "base": server.weights[0].base,
        "result": server.weights[1].base,
        "codec": {"name": "uniform", "version": 1, "block": 0},
    }


def test_a_smaller_error_than_without_feedback(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with_feedback, without = Server(tmp_path / "a", "uniform:step=3"), Server(tmp_path / "b", "uniform:step=3")
    for _ in range(20):
        with_feedback.publish()
        without.publish()
        without.residual = None
    off = [norm(small_round.flat(server.weights[-1].tensors) - server.wanted) for server in (with_feedback, without)]
    assert off[0] < 0.8 * off[1]


def forge(path: Path, to: Path, tensors: dict[str, Any] | None = None, **changed: Any) -> Path:
    """A change file with other header fields (None to drop one) or arrays."""
    with safe_open(path, "numpy") as file:
        header = {**json.loads(file.metadata()["fedpara_edge"]), **changed}
    stored = {key: value for key, value in header.items() if value is not None}
    save_file(tensors or load_file(path), to, metadata={"fedpara_edge": json.dumps(stored)})
    return to


@pytest.fixture
def server(tmp_path: Path) -> Server:
    server = Server(tmp_path, "int4", small_round.LAYOUT)
    for _ in range(3):
        server.publish()
    return server


def refused(weights: Weights, path: Path, code: str, kind: type[FedparaError]) -> str:
    with pytest.raises(kind) as caught:
        apply_change(weights, path)
    assert caught.value.code == code
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


def test_changes_out_of_order_or_of_other_weights_are_refused(server: Server) -> None:
    for round_, change in [(0, 1), (0, 2), (1, 0), (2, 1), (3, 0)]:
        message = refused(server.weights[round_], server.changes[change], "wrong_base", WrongBundleError)
        assert f"this change leads to round {change + 1}" in message
    other = replace(server.weights[0], fingerprint="0" * 64)
    refused(other, server.changes[0], "wrong_fingerprint", WrongBundleError)
    changed = replace(server.weights[0], tensors=dict(server.weights[0].tensors))
    changed.tensors["scale"] = changed.tensors["scale"] + np.float32(1)
    refused(changed, server.changes[0], "wrong_base", WrongBundleError)


def test_altered_changes_are_refused(tmp_path: Path, server: Server) -> None:
    weights, change, forged = server.weights[0], server.changes[0], tmp_path / "forged"
    payload = load_file(change)["payload"]
    for place in range(4, len(payload)):
        spoilt = payload.copy()
        spoilt[place] ^= 1
        with pytest.raises(InvalidUpdateError) as caught:
            apply_change(weights, forge(change, forged, {"payload": spoilt}))
        assert caught.value.code in ("payload", "result", "not_finite")
    refused(weights, forge(change, forged, result="0" * 64), "result", InvalidUpdateError)
    refused(weights, forge(change, forged, round=5), "result", InvalidUpdateError)
    escapes = forge(change, forged, result="\x1b[2J\n" * 20)
    assert refused(weights, escapes, "result", InvalidUpdateError).isprintable()
    for field, value in {"round": 0, "result": 7, "base": None, "fingerprint": [1]}.items():
        refused(weights, forge(change, forged, **{field: value}), "header", InvalidUpdateError)
    refused(weights, forge(change, forged, round=True), "header", InvalidUpdateError)
    refused(weights, forge(change, forged, codec={"name": "int5", "version": 1}), "unknown_codec", InvalidUpdateError)
    refused(weights, forge(change, forged, format="fedpara-edge/update"), "wrong_format", InvalidUpdateError)
    refused(weights, tmp_path / "nowhere", "unreadable", InvalidUpdateError)
    forged.write_bytes(change.read_bytes()[:-3])
    refused(weights, forged, "truncated", InvalidUpdateError)


def test_weights_that_would_not_be_finite_are_neither_published_nor_applied(tmp_path: Path) -> None:
    base = small_round.start_round(tmp_path, LAYOUT, number=0)
    encoder = find_encoder("float32")
    for value in (np.nan, np.inf):
        target = next_target(base)
        target.tensors["t1"][3] = value
        with pytest.raises(DivergedError, match="tensor 't1': expected a finite change"):
            publish_change(tmp_path / "change", base, target, encoder, residual=None)
    assert not (tmp_path / "change").exists()
    publish_change(tmp_path / "change", base, next_target(base), encoder, residual=None)
    tensors = load_file(tmp_path / "change")
    tensors["t3"][0, 0] = np.inf
    forged = forge(tmp_path / "change", tmp_path / "forged", tensors)
    assert "tensor 't3'" in refused(base, forged, "not_finite", InvalidUpdateError)


def test_a_codec_that_rounds_to_infinity_publishes_nothing(tmp_path: Path) -> None:
    base = small_round.start_round(tmp_path, LAYOUT, number=0)
    base.tensors["t1"][...] = 1e38
    target = replace(base, round=1, tensors={**base.tensors, "t1": np.full(7, np.finfo(np.float32).max)})
    message = "tensor 't1': expected finite weights after the change, .* use weights that did not diverge"
    with pytest.raises(DivergedError, match=message):
        publish_change(tmp_path / "change", base, target, find_encoder("bfloat16"), residual=None)
    assert not (tmp_path / "change").exists()


def test_rounds_only_go_forward(tmp_path: Path) -> None:
    base = small_round.start_round(tmp_path, LAYOUT, number=4)
    for target in (base, replace(base, round=3), replace(next_target(base), fingerprint="0" * 64)):
        with pytest.raises(InputError, match="expected new weights of bundle ffffffffffff… after round 4"):
            publish_change(tmp_path / "change", base, target, find_encoder("float32"), residual=None)


def test_the_command_catches_up(tmp_path: Path, server: Server, run: Command) -> None:
    write_weights(tmp_path / "w0", server.weights[0])
    done = run("apply", tmp_path / "w0", *server.changes, "-o", tmp_path / "w3", "--json").json
    assert done["round"] == done["changes"] == 3
    assert done["received_bytes"] == sum(change.stat().st_size for change in server.changes)
    assert read_weights(tmp_path / "w3").base == server.weights[3].base
    text = run("apply", tmp_path / "w0", *server.changes, "-o", tmp_path / "w3", "--overwrite").out
    assert text.startswith(f"{tmp_path / 'w3'}: round 3, from round 0 by 3 changes\nreceived ")
    assert (tmp_path / "w3").read_bytes() == _as_written(tmp_path, server.weights[3])


def _as_written(folder: Path, weights: Weights) -> bytes:
    write_weights(folder / "expected", weights)
    return (folder / "expected").read_bytes()


def test_the_command_writes_nothing_when_it_refuses(tmp_path: Path, server: Server, run: Command) -> None:
    write_weights(tmp_path / "w0", server.weights[0])
    first, second, _ = server.changes
    out = tmp_path / "out"
    assert run("apply", tmp_path / "w0", second, first, "-o", out).code == 6
    assert run("apply", tmp_path / "w0", first, first, "-o", out).code == 6
    forged = forge(first, tmp_path / "forged", result="0" * 64)
    ended = run("apply", tmp_path / "w0", forged, "-o", out)
    assert ended.code == 3
    assert ended.err.startswith(f"Error: {forged}: result: expected 000000000000…")
    assert run("apply", tmp_path / "w0", "-o", out).code == 2
    assert not out.exists()
    assert run("apply", tmp_path / "w0", first, "-o", tmp_path / "w0", "--overwrite").code == 2
    write_weights(out, server.weights[0])
    assert run("apply", tmp_path / "w0", first, "-o", out).code == 7
    assert read_weights(out).base == server.weights[0].base
    assert run("apply", tmp_path / "w0", first, "-o", out, "--overwrite").code == 0
    assert run("apply", tmp_path / "w0", first, "-o", out).code == 0


def test_the_command_replaces_a_link_and_not_what_it_leads_to(tmp_path: Path, server: Server, run: Command) -> None:
    write_weights(tmp_path / "w0", server.weights[0])
    (tmp_path / "mine").write_text("mine")
    for name, target in (("to-base", "w0"), ("to-mine", "mine"), ("to-nothing", "nothing")):
        (tmp_path / name).symlink_to(tmp_path / target)
    (tmp_path / "hard").hardlink_to(tmp_path / "w0")
    for name in ("to-base", "hard"):
        refused = run("apply", tmp_path / "w0", server.changes[0], "-o", tmp_path / name, "--overwrite")
        assert (refused.code, "found one of them" in refused.err) == (2, True)
    for name in ("to-mine", "to-nothing"):
        assert run("apply", tmp_path / "w0", server.changes[0], "-o", tmp_path / name, "--overwrite").code == 0
        assert not (tmp_path / name).is_symlink()
        assert read_weights(tmp_path / name).base == server.weights[1].base
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "nothing").exists()
    assert read_weights(tmp_path / "w0").base == server.weights[0].base


def test_a_change_that_goes_away_meanwhile_leaves_no_output(
    tmp_path: Path, server: Server, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_weights(tmp_path / "w0", server.weights[0])

    def applied_and_removed(weights: Weights, path: Path) -> Weights:
        moved = apply_change(weights, path)
        path.unlink()
        return moved

    monkeypatch.setattr("fedpara_edge.formats.change.apply_change", applied_and_removed)
    ended = run("apply", tmp_path / "w0", *server.changes, "-o", tmp_path / "w3")
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert not (tmp_path / "w3").exists()
