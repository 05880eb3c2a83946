"""Signed distribution, attack by attack: what a device takes from a repository is what its root has signed."""

import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from command_line import Command
from signed import RUN, first_root, make_keys, release
from small_net import SmallBundle
from tuf.api import metadata as tuf_metadata
from tuf.api.metadata import Metadata

from fedpara_edge.codecs import find_encoder
from fedpara_edge.errors import FedparaError, InputError, TrustError, WrongBundleError
from fedpara_edge.formats.bundle import Bundle, open_bundle
from fedpara_edge.formats.change import publish_change
from fedpara_edge.formats.weights import Weights, read_weights, write_weights
from fedpara_edge.storage.tensorfile import write_tensors
from fedpara_edge.trust import client, repository
from fedpara_edge.trust.client import receive
from fedpara_edge.trust.keys import new_key, read_signer
from fedpara_edge.trust.publication import Additions
from fedpara_edge.trust.roots import make_root, sign_root


class Fleet:
    """A published bundle, and a device that has not fetched it yet."""

    def __init__(self, folder: Path, bundle: Bundle) -> None:
        self.folder, self.bundle = folder, bundle
        self.keys = make_keys(folder)
        self.root = first_root(folder, self.keys)
        self.repository, self.cache = folder / "repo", folder / "cache"
        self.publish(bundle=bundle.path)

    def publish(self, **files: Path | tuple[Path, ...]) -> repository.Published:
        return release(self.repository, self.root, self.keys, **files)  # type: ignore[arg-type]

    def receive(self, *, root: Path | None = None) -> client.Received:
        return receive(str(self.repository), root or self.root, self.cache)

    def weights(self, number: int) -> Path:
        """Weights of a round, which differ from those before."""
        path = self.folder / f"round-{number}.safetensors"
        first = read_weights(self.bundle.file("weights.safetensors"))
        moved = {name: tensor + np.float32(number / 8) for name, tensor in first.tensors.items()}
        write_weights(path, Weights(first.fingerprint, number, first.layout, moved))
        return path

    def metadata(self, pattern: str) -> Path:
        return max((self.repository / "metadata").glob(pattern))


@pytest.fixture
def fleet(small_bundle: SmallBundle, tmp_path: Path) -> Fleet:
    return Fleet(tmp_path, small_bundle())


def refused(fleet: Fleet, code: str, words: str) -> None:
    with pytest.raises(TrustError, match=words) as found:
        fleet.receive()
    assert found.value.code == code
    assert "\n" not in str(found.value)


def copied(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(folder, folder.with_name(name)))


def restore(saved: Path, place: Path) -> None:
    shutil.rmtree(place)
    shutil.copytree(saved, place)


def test_a_device_gets_what_was_published(fleet: Fleet) -> None:
    received = fleet.receive()
    assert received.run == RUN
    assert open_bundle(received.bundle).manifest == fleet.bundle.manifest
    assert received.weights.read_bytes() == fleet.bundle.file("weights.safetensors").read_bytes()
    assert received.fetched_bytes > 0
    assert fleet.receive().fetched_bytes == 0
    newest = fleet.weights(1)
    fleet.publish(weights=newest)
    received = fleet.receive()
    assert received.weights.read_bytes() == newest.read_bytes()
    assert received.fetched_bytes == newest.stat().st_size


def test_a_web_server_or_a_copy_carries_it(fleet: Fleet, tmp_path: Path) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *_: object) -> None:
            del format

    stick = copied(fleet.repository, "stick")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=stick)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        received = receive(f"http://127.0.0.1:{server.server_port}/", fleet.root, tmp_path / "other")
        server.shutdown()
    assert open_bundle(received.bundle).manifest == fleet.bundle.manifest
    with pytest.raises(FedparaError, match="expected to fetch it, found") as found:
        receive(f"http://127.0.0.1:{server.server_port}/", fleet.root, tmp_path / "other")
    assert found.value.exit_code == 1


def test_changes_are_fetched_in_place_of_weights(fleet: Fleet, tmp_path: Path) -> None:
    fleet.receive()
    base = read_weights(fleet.bundle.file("weights.safetensors"))
    change, newest = tmp_path / "c.safetensors", tmp_path / "w.safetensors"
    target = read_weights(fleet.weights(1))
    encoder = find_encoder("int4")
    write_weights(newest, publish_change(change, base, target, encoder, residual=None).weights)
    assert change.stat().st_size < newest.stat().st_size
    fleet.publish(weights=newest, changes=(change,))
    received = fleet.receive()
    assert received.weights.read_bytes() == newest.read_bytes()
    assert received.fetched_bytes == change.stat().st_size


def test_a_change_that_leads_elsewhere_is_replaced_by_whole_weights(fleet: Fleet, tmp_path: Path) -> None:
    fleet.receive()
    base = read_weights(fleet.bundle.file("weights.safetensors"))
    change = tmp_path / "c.safetensors"
    encoder = find_encoder("int4")
    publish_change(change, base, read_weights(fleet.weights(1)), encoder, residual=None)
    newest = fleet.weights(1)
    fleet.publish(weights=newest, changes=(change,))
    assert fleet.receive().weights.read_bytes() == newest.read_bytes()


def test_rollback(fleet: Fleet) -> None:
    old = copied(fleet.repository, "old")
    fleet.publish(weights=fleet.weights(1))
    fleet.receive()
    restore(old, fleet.repository)
    refused(fleet, "rollback", r"timestamp\.json: rollback: expected nothing older .* take a newer copy")


def test_freeze(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.receive()
    later(monkeypatch, timedelta(days=8))
    refused(fleet, "expired", r"freeze: .*timestamp\.json is expired")
    release(fleet.repository, fleet.root, fleet.keys, by=["online"])
    fleet.receive()


def later(monkeypatch: pytest.MonkeyPatch, time: timedelta) -> None:
    """Move the clock of the libraries forward."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> "Clock":  # type: ignore[override]
            del tz
            return cls.fromtimestamp((datetime.now(UTC) + time).timestamp(), UTC)

    monkeypatch.setattr("tuf.ngclient._internal.trusted_metadata_set.datetime.datetime", Clock, raising=True)
    monkeypatch.setattr("fedpara_edge.trust.roots.datetime", Clock)


def test_mix_and_match(fleet: Fleet) -> None:
    old = fleet.metadata("*.targets.json").read_bytes()
    fleet.publish(weights=fleet.weights(1))
    fleet.metadata("*.targets.json").write_bytes(old)
    refused(fleet, "mix_and_match", r"2\.targets\.json: mix-and-match")


@pytest.mark.parametrize("name", ["train_step.onnx", "manifest.json", "weights.safetensors"])
def test_a_changed_file(fleet: Fleet, name: str) -> None:
    (path,) = (fleet.repository / "targets" / "bundle").glob(f"*.{name}")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused(fleet, "changed_file", rf"{name}: expected the content that is signed, found a changed file")


def test_a_file_changed_on_the_device_is_fetched_again(fleet: Fleet) -> None:
    graph = fleet.receive().bundle / "train_step.onnx"
    good = graph.read_bytes()
    graph.write_bytes(good[:-1] + b"\0")
    (graph.parent / "extra.onnx").write_bytes(b"x")
    assert fleet.receive().fetched_bytes == len(good)
    assert graph.read_bytes() == good
    assert not (graph.parent / "extra.onnx").exists()


def test_a_wrong_root(fleet: Fleet, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    mine = first_root(other, make_keys(other))
    with pytest.raises(TrustError, match="the root is that of another repository") as found:
        fleet.receive(root=mine)
    assert found.value.code == "wrong_root"


def test_metadata_signed_by_another_key(fleet: Fleet, tmp_path: Path) -> None:
    path = fleet.metadata("timestamp.json")
    forged = Metadata[tuf_metadata.Timestamp].from_file(str(path))
    forged.signed.version += 1
    new_key(tmp_path / "mallory")
    forged.sign(read_signer(tmp_path / "mallory"))
    path.write_bytes(forged.to_bytes())
    refused(fleet, "wrong_root", "expected signatures of the keys")
    with pytest.raises(TrustError, match="expected signatures of the timestamp keys, found others"):
        fleet.publish()


def test_a_file_that_is_missing_is_named(fleet: Fleet) -> None:
    (path,) = (fleet.repository / "targets" / "bundle").glob("*.eval_step.onnx")
    path.unlink()
    with pytest.raises(FedparaError, match=r"eval_step\.onnx: expected a file of the repository, found none") as found:
        fleet.receive()
    assert found.value.code == "incomplete"


def next_root(fleet: Fleet, *, signers: list[str]) -> Path:
    """Root metadata of version 2, in which the key of carol, and those of both machines, are new ones."""
    path = fleet.folder / "root-2.json"
    for name in ("dave", "targets-2", "online-2"):
        new_key(fleet.folder / name)
        fleet.keys[name] = fleet.folder / name
    roles = {
        "root": [fleet.keys[name].with_suffix(".pub") for name in ("alice", "bob", "dave")],
        "targets": [fleet.keys["targets-2"]],
        "timestamp": [fleet.keys["online-2"]],
        "snapshot": [fleet.keys["online-2"]],
    }
    make_root(path, roles, days=365, previous=fleet.root, signers=[fleet.keys[name] for name in signers])
    return path


def test_keys_are_rotated_and_devices_follow(fleet: Fleet) -> None:
    fleet.receive()
    root = next_root(fleet, signers=["alice", "bob"])
    by = ["targets-2", "online-2"]
    release(fleet.repository, root, fleet.keys, by=by, weights=fleet.weights(1))
    assert fleet.receive().weights.read_bytes() == fleet.weights(1).read_bytes()
    with pytest.raises(InputError, match="expected the private keys of the targets"):
        release(fleet.repository, root, fleet.keys, by=["targets", "online"], weights=fleet.weights(2))


@pytest.mark.parametrize("signers", [["alice"], ["alice", "dave"]])
def test_a_rotation_needs_the_threshold_of_the_old_root(fleet: Fleet, signers: list[str]) -> None:
    root = next_root(fleet, signers=signers)
    with pytest.raises(TrustError, match="expected signatures of 2 root keys"):
        release(fleet.repository, root, fleet.keys, by=["targets-2", "online-2"])
    shutil.copyfile(root, fleet.repository / "metadata" / "2.root.json")
    refused(fleet, "wrong_root", "root was signed by 1/2 keys")
    sign_root(root, [fleet.keys["bob"]])
    (fleet.repository / "metadata" / "2.root.json").unlink()
    release(fleet.repository, root, fleet.keys, by=["targets-2", "online-2"])
    fleet.receive()


def test_a_publisher_builds_on_nothing_that_was_changed(fleet: Fleet, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    keys = make_keys(other)
    mine = first_root(other, keys)
    with pytest.raises(TrustError, match="the repository is another's"):
        release(fleet.repository, mine, keys, weights=fleet.weights(1))
    path = fleet.metadata("*.targets.json")
    content = json.loads(path.read_bytes())
    content["signed"]["version"] = 7
    path.write_text(json.dumps(content))
    with pytest.raises(TrustError, match=r"1\.targets\.json: expected metadata as they were written"):
        fleet.publish(weights=fleet.weights(1))


def test_files_of_two_bundles_are_refused(fleet: Fleet, small_bundle: SmallBundle) -> None:
    with pytest.raises(WrongBundleError, match="expected files of one bundle"):
        fleet.publish(bundle=small_bundle("adamw").path, weights=fleet.weights(1))


def test_weights_of_another_bundle_than_the_published_one_are_refused(fleet: Fleet, small_bundle: SmallBundle) -> None:
    with pytest.raises(WrongBundleError, match=r"bundle/manifest\.json of "):
        fleet.publish(weights=small_bundle("adamw").file("weights.safetensors"))
    fleet.receive()


def test_a_change_without_its_round_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    write_tensors(tmp_path / "c", {}, {"format": "fedpara-edge/change", "version": 1})
    with pytest.raises(WrongBundleError, match="expected the round of the change, found None"):
        fleet.publish(changes=(tmp_path / "c",))


def test_a_run_and_a_bundle_go_together() -> None:
    with pytest.raises(InputError, match="run: expected together with a bundle"):
        Additions(run="winter")


def test_old_files_stay_for_one_version(fleet: Fleet) -> None:
    folder = fleet.repository / "targets" / "weights"
    for number in (1, 2, 3):
        fleet.publish(weights=fleet.weights(number))
    assert sorted(path.name.partition(".")[2] for path in folder.iterdir()) == [
        "round-2.safetensors",
        "round-3.safetensors",
    ]


def test_the_commands(here: Path, run: Command) -> None:
    assert run("keys", "new", "alice", "bob", "targets", "online").code == 0
    made = run("keys", "root", "--root-key", "alice", "--root-key", "bob.pub", "--threshold", "2", "--targets-key",
               "targets", "--timestamp-key", "online.pub", "-o", "root.json")  # fmt: skip
    assert "signed by 1 of its root keys, 2 needed" in made.out
    publish = ("publish", "repo", "--root", "root.json", "--key", "targets", "--key", "online", "--json")
    ended = run(*publish, "--bundle", "bundle", "--run", RUN)
    assert ended.code == 5
    assert run("keys", "sign", "root.json", "--key", "bob").code == 0
    ended = run(*publish, "--bundle", "bundle", "--run", RUN)
    assert ended.json["versions"] == {"root": 1, "targets": 1, "snapshot": 1, "timestamp": 1}
    source = ("--repository", "repo", "--root", "root.json", "--data", "d.npz", "--state", "own")
    assert run("train", *source, "-o", "u.safetensors").code == 0
    by_files = run("train", "bundle", "--data", "d.npz", "--state", "other", "-o", "v.safetensors")
    assert by_files.code == 0
    assert run("evaluate", *source, "--json").json["examples"] == 8
    ended = run("train", "bundle", *source, "-o", "w.safetensors")
    assert (ended.code, "found both" in ended.err) == (2, True)
    (graph,) = Path("repo/targets/bundle").glob("*.train_step.onnx")
    graph.write_bytes(b"changed")
    Path("own/repository/bundle/train_step.onnx").unlink()
    ended = run("train", *source, "-o", "w.safetensors")
    assert ended.code == 5
    assert "train_step.onnx: expected the content that is signed" in ended.err
    assert not (here / "w.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--root", "r.json"), "--root: expected with --repository"),
        (("--repository", "repo"), "--root: expected the root metadata that this device trusts"),
        (("--repository", "repo", "--root", "r.json"), "--cache: expected a folder for what was verified"),
        (("--repository", "repo", "--root", "r.json", "--weights", "w"), "--weights: expected the weights of"),
        (("--repository", "repo", "--root", "d.npz", "--state", "s"), "d.npz: expected root metadata"),
    ],
)
@pytest.mark.usefixtures("here")
def test_options_that_do_not_go_together(run: Command, arguments: tuple[str, ...], words: str) -> None:
    ended = run("evaluate", *([] if "--repository" in arguments else ["bundle"]), *arguments, "--data", "d.npz")
    assert ended.code == 2
    assert words in ended.err


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_private_keys_are_for_their_owner_alone(here: Path, run: Command) -> None:
    assert run("keys", "new", "mine").code == 0
    assert (here / "mine").stat().st_mode & 0o777 == 0o600
    shown = run("keys", "show", "mine", "mine.pub", "--json").json["keys"]
    assert shown["mine"] == shown["mine.pub"]
    assert shown["mine"].startswith("ed25519:")
    assert run("keys", "new", "mine").code == 7
    (here / "mine").chmod(0o640)
    ended = run("keys", "show", "mine")
    assert ended.code == 2
    assert "mine: expected a private key that its owner alone can read (mode 600), found mode 640" in ended.err
