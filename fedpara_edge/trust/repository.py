"""The signed repository: a folder that any static file server, share or USB stick can carry to the devices.

    metadata/<n>.root.json, <n>.targets.json, <n>.snapshot.json, timestamp.json
    targets/bundle/<sha256>.<file>                          every file of the bundle
    targets/weights/<sha256>.round-<n>.safetensors          the newest weights, after round 0
    targets/models/<sha256>.round-<n>.onnx                  a folded model
    targets/changes/<sha256>.round-<n>.safetensors          changes that lead there
    targets/transcripts/<sha256>.round-<n>.json             transcripts of rounds, for everybody who audits them

as The Update Framework specifies it, with consistent snapshots (theupdateframework.github.io/specification). The target
`bundle/manifest.json` has `{"run", "fingerprint"}` as its custom data: the name of the federation's run, to which
updates are signed, and the fingerprint of the bundle.

The timestamp is written last, so that a process that is killed leaves the repository as it was, and the same call
completes it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from securesystemslib.signer import Signer
from tuf.api.exceptions import LengthOrHashMismatchError, RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from fedpara_edge.errors import InputError, TrustError, WrongBundleError, brief, brief_text
from fedpara_edge.formats import change as change_file
from fedpara_edge.formats.bundle import MANIFEST, open_bundle
from fedpara_edge.formats.folded import read_folded
from fedpara_edge.formats.transcript import read_transcript
from fedpara_edge.formats.weights import read_weights
from fedpara_edge.storage.atomic import remove_leftovers_in, replacing_file
from fedpara_edge.storage.locking import hold
from fedpara_edge.storage.rounds import round_path
from fedpara_edge.storage.tensorfile import TensorFile
from fedpara_edge.storage.wholefile import read_whole
from fedpara_edge.trust.keys import read_signer
from fedpara_edge.trust.publication import Additions, Lifetimes
from fedpara_edge.trust.roots import after, check_root, parse_root, read_root

BUNDLE, WEIGHTS, MODELS, CHANGES, TRANSCRIPTS = "bundle", "weights", "models", "changes", "transcripts"
"""Folders of targets."""
_MANIFEST = f"{BUNDLE}/{MANIFEST}"
_LOCK = ".lock"
Kind = TypeVar("Kind", Targets, Snapshot, Timestamp)


@dataclass(frozen=True)
class Published:
    """A repository after a call of `publish`.

    Args:
        versions: Version of the newest metadata by role.
        files: Number of files that are published.
        run: Name of the run.
        expires: Moment at which the timestamp expires, ISO 8601.
    """

    versions: Mapping[str, int]
    files: int
    run: str
    expires: str


def publish(folder: Path, root: Path, additions: Additions, signers: Sequence[Path], lifetimes: Lifetimes) -> Published:
    """Add files to a repository, made if it is missing, and sign it anew.

    Roles are signed anew for which enough keys are given; without additions that prolongs them.

    Args:
        folder: Folder of the repository.
        root: Root metadata to trust; a version that the repository does not have yet is added.
        additions: Files to publish.
        signers: Private key files.
        lifetimes: Days until what is signed expires.

    Raises:
        InputError: A file or key is missing or does not fit.
        TrustError: The repository, or the root, is not signed as it should be, or was changed.
        WrongBundleError: The weights or changes belong to another bundle.
        BusyError: Another process publishes there.
        FedparaError: The disk refuses a write.
    """
    by_id = {signer.public_key.keyid: signer for signer in map(read_signer, signers)}
    try:
        (folder / "metadata").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: expected a writable folder, found {error.strerror}; choose another") from error
    with hold(folder / _LOCK, folder=folder, kind="a repository"):
        remove_leftovers_in(folder)
        publisher = _Publisher(folder, root, by_id, lifetimes)
        return publisher.publish(additions)


class _Publisher:
    """A repository that is being changed."""

    def __init__(self, folder: Path, root: Path, signers: Mapping[str, Signer], lifetimes: Lifetimes) -> None:
        self._metadata = folder / "metadata"
        self._folder = folder
        self._signers = signers
        self._lifetimes = lifetimes
        self._roots = self._follow(root)
        self._root = self._roots[-1]
        self._timestamp = self._read("timestamp", Timestamp, None)
        self._snapshot: Metadata[Snapshot] | None = None
        self._targets: Metadata[Targets] | None = None
        if self._timestamp is not None:
            self._snapshot = self._read("snapshot", Snapshot, self._timestamp.signed.snapshot_meta)
        if self._snapshot is not None:
            self._targets = self._read("targets", Targets, self._snapshot.signed.meta["targets.json"])

    def publish(self, additions: Additions) -> Published:
        """Write the files, then the metadata, the timestamp last."""
        old = {} if self._targets is None else self._targets.signed.targets
        new, sources = _with_additions(old, additions)
        if _MANIFEST not in new:
            raise InputError("expected one at first, found none; give it with --run", key="bundle")
        for name, source in sources.items():
            self._store(new[name], source)
        days = self._lifetimes
        targets, snapshot = self._targets, self._snapshot
        if targets is None or new != old or not self._is_signed(targets) or self._can_sign("targets"):
            signed = Targets(version=1 if targets is None else targets.signed.version + 1, targets=new)
            targets = self._write(signed, days.targets_days)
        meta = {"targets.json": _meta_of(targets)}
        if (
            snapshot is None
            or snapshot.signed.meta != meta
            or not self._is_signed(snapshot)
            or self._can_sign("snapshot")
        ):
            number = 1 if snapshot is None else snapshot.signed.version + 1
            snapshot = self._write(Snapshot(version=number, meta=meta), days.snapshot_days)
        number = 1 if self._timestamp is None else self._timestamp.signed.version + 1
        timestamp = self._write(
            Timestamp(version=number, snapshot_meta=_meta_of(snapshot)), days.timestamp_days, name="timestamp.json"
        )
        self._remove_others({**old, **new})
        return Published(
            versions={
                "root": self._root.version,
                **{role.signed.type: role.signed.version for role in (targets, snapshot, timestamp)},
            },
            files=len(new),
            run=new[_MANIFEST].custom["run"],
            expires=timestamp.signed.expires.isoformat(),
        )

    def _follow(self, path: Path) -> list[Root]:
        """The trusted root, the one before if there is one, and all that follow, the newest last."""
        trusted = read_root(path)
        check_root(path, trusted, [trusted.signed])
        roots, version = [trusted.signed], trusted.signed.version
        before = self._metadata / f"{version - 1}.root.json"
        if before.is_file():
            earlier = read_root(before)
            check_root(before, earlier, [earlier.signed])
            check_root(path, trusted, [earlier.signed])
            roots.insert(0, earlier.signed)
        own = self._metadata / f"{version}.root.json"
        if not own.exists():
            if version > 1 and not before.exists():
                raise InputError(
                    f"{path}: expected root metadata of version 1 or the version after the repository's, found "
                    f"version {version}; publish the versions before it first"
                )
            with replacing_file(own) as temporary:
                shutil.copyfile(path, temporary)
        elif read_whole(own) != read_whole(path):
            raise TrustError(
                f"{own}: expected the root metadata of {path}, found others of version {version}; the repository is "
                "another's, or was changed",
                code="wrong_root",
            )
        while (following := self._metadata / f"{roots[-1].version + 1}.root.json").is_file():
            newer = parse_root(following, read_whole(following))
            check_root(following, newer, [roots[-1], newer.signed])
            roots.append(newer.signed)
        if roots[-1].is_expired():
            raise TrustError(
                f"{path}: expected root metadata that are valid, found version {roots[-1].version}, which expired "
                f"{roots[-1].expires.isoformat()}; make the next version with keys root --previous",
                code="expired",
            )
        return roots

    def _read(self, role: str, kind: type[Kind], meta: MetaFile | None) -> Metadata[Kind] | None:
        """Metadata that this repository has, verified; None if it has none yet."""
        path = self._metadata / (f"{role}.json" if meta is None else f"{meta.version}.{role}.json")
        try:
            data = read_whole(path)
            if meta is not None:
                meta.verify_length_and_hashes(data)
            metadata = Metadata[Kind].from_bytes(data)
            signed = metadata.signed_bytes
            by = [root for root in self._roots if root.get_verification_result(role, signed, metadata.signatures)]
        except FileNotFoundError as error:
            if meta is None:
                return None
            raise InputError(f"{path}: expected metadata of the repository, found none; copy it again") from error
        except OSError as error:
            raise InputError(f"{path}: expected metadata, found {error.strerror}; copy it again") from error
        except RepositoryError as error:
            raise TrustError(
                f"{path}: expected metadata as they were written, found {error}", code="mix_and_match"
            ) from error
        if not by or not isinstance(metadata.signed, kind):
            raise TrustError(f"{path}: expected signatures of the {role} keys, found others; it was changed")
        return metadata

    def _is_signed(self, metadata: Metadata[Kind]) -> bool:
        """Whether metadata are signed by keys that the newest root has for their role."""
        role, signed = metadata.signed.type, metadata.signed_bytes
        return bool(self._root.get_verification_result(role, signed, metadata.signatures))

    def _can_sign(self, role: str) -> bool:
        return len(self._keys_of(role)) >= self._root.roles[role].threshold

    def _keys_of(self, role: str) -> list[Signer]:
        return [self._signers[keyid] for keyid in self._root.roles[role].keyids if keyid in self._signers]

    def _write(self, signed: Kind, days: int, *, name: str | None = None) -> Metadata[Kind]:
        role = signed.type
        if not self._can_sign(role):
            raise InputError(
                f"expected the private keys of the {role} ({self._root.roles[role].threshold} of "
                f"{len(self._root.roles[role].keyids)}), found {len(self._keys_of(role))} of them; give them",
                key="key",
            )
        signed.expires = after(days)
        metadata = Metadata(signed)
        for signer in self._keys_of(role):
            metadata.sign(signer, append=True)
        with replacing_file(self._metadata / (name or f"{signed.version}.{role}.json")) as temporary:
            temporary.write_bytes(metadata.to_bytes())
        return metadata

    def _store(self, target: TargetFile, source: Path) -> None:
        for path in self._places(target):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing_file(path) as temporary:
                shutil.copyfile(source, temporary)
                try:
                    with temporary.open("rb") as file:
                        target.verify_length_and_hashes(file)
                except LengthOrHashMismatchError as error:
                    raise InputError(f"{source}: expected a file at rest, found it changing; publish again") from error

    def _places(self, target: TargetFile) -> list[Path]:
        return [self._folder / "targets" / path for path in target.get_prefixed_paths()]

    def _remove_others(self, kept: Mapping[str, TargetFile]) -> None:
        """Remove the files of targets but those of this version and the one before, which devices may be fetching."""
        places = {place for target in kept.values() for place in self._places(target)}
        for path in (self._folder / "targets").glob("*/*"):
            if path not in places and path.is_file():
                path.unlink()


def _with_additions(
    old: Mapping[str, TargetFile], additions: Additions
) -> tuple[dict[str, TargetFile], dict[str, Path]]:
    """Targets with the additions, and the source of each that is added."""
    fingerprints: dict[Path, Any] = {}
    sources = dict(_sources(additions, fingerprints))
    new = {} if additions.bundle is not None else dict(old)
    if manifest := new.get(_MANIFEST):
        fingerprints[Path(_MANIFEST)] = manifest.custom["fingerprint"]
    if len(set(fingerprints.values())) > 1:
        named = ", ".join(f"{path} of {brief_text(found, max_length=12)}" for path, found in fingerprints.items())
        raise WrongBundleError(f"expected files of one bundle, found {named}; publish those that belong together")
    for kind, newer in ((WEIGHTS, additions.weights), (MODELS, additions.model)):
        if newer is not None:
            new = {name: target for name, target in new.items() if not name.startswith(f"{kind}/")}
    for name, source in sources.items():
        new[name] = TargetFile.from_file(name, str(source))
    if additions.bundle is not None:
        custom = {"run": additions.run, "fingerprint": fingerprints[additions.bundle]}
        new[_MANIFEST].unrecognized_fields["custom"] = custom
    return new, sources


def _sources(additions: Additions, fingerprints: dict[Path, Any]) -> Iterator[tuple[str, Path]]:
    """Name as a target, and path, of each file to add; the fingerprint of each goes into `fingerprints`."""
    if additions.bundle is not None:
        bundle = open_bundle(additions.bundle)
        fingerprints[additions.bundle] = bundle.manifest.fingerprint
        for name in (MANIFEST, *bundle.manifest.files):
            yield f"{BUNDLE}/{name}", bundle.file(name)
    if additions.weights is not None:
        weights = read_weights(additions.weights)
        fingerprints[additions.weights] = weights.fingerprint
        yield round_path(Path(WEIGHTS), weights.round).as_posix(), additions.weights
    if additions.model is not None:
        spec, _ = read_folded(additions.model)
        if spec.personal:
            raise InputError(
                f"{additions.model}: expected a model for everybody, found one with a device's own personal tensors; "
                "fold it without --state",
                key="model",
            )
        fingerprints[additions.model] = spec.fingerprint
        yield f"{MODELS}/round-{spec.round}.onnx", additions.model
    for path in additions.changes:
        with TensorFile(path, format=change_file.FORMAT, error=WrongBundleError) as file:
            fingerprints[path], number = file.header.get("fingerprint"), file.header.get("round")
        if type(number) is not int:
            raise WrongBundleError(f"{path}: expected the round of the change, found {brief(number)}; make it again")
        yield round_path(Path(CHANGES), number).as_posix(), path
    for path in additions.transcripts:
        transcript = read_transcript(path)
        fingerprints[path] = transcript.fingerprint
        yield f"{TRANSCRIPTS}/round-{transcript.round}.json", path


def _meta_of(metadata: Metadata[Kind]) -> MetaFile:
    return MetaFile.from_data(metadata.signed.version, metadata.to_bytes(), ["sha256"])
