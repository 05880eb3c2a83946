"""The update file: what a device sends after its local epochs, the change of the shared tensors and nothing else.

Format `fedpara-edge/update`, version 1 (container: `storage.tensorfile`). Header:

    format, version
    fingerprint   hexadecimal; of the bundle
    round         of the base weights
    base          SHA-256 of the weights from which training started (`weights`)
    client        name of the device, 1 to 200 characters
    examples      number of local training examples, its weight in the mean; positive
    steps         optimizer steps taken; positive
    codec         {"name", "version", …}: how the change is stored (`codecs`), with the settings of that codec
    metrics       measured on the device, e.g. {"loss": 0.41}; at most 64 finite numbers, with names of at most 100
                  characters
    privacy       {"name": "gaussian", "clip", "noise"}: the noise that the device added (`privacy.local`); examples
                  and steps are 1 then, and no metric is measured; absent without noise

    sums          of what the chunks of the change are stored in (`codecs.sums`)
    digest        hexadecimal; of the header, with no content (`storage.digest`)

no others, and the arrays the codec stores. The last two are missing together in files of releases up to 0.2. A composed
weight, a personal tensor or a training example is never in it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedpara_edge.codecs import open_codec
from fedpara_edge.codecs.codec import Decoder, Encoder, flatten, in_order, not_finite, unflatten
from fedpara_edge.codecs.decoding import ScaledDecoder
from fedpara_edge.codecs.statistics import encode_change
from fedpara_edge.codecs.sums import FIELD as SUMS
from fedpara_edge.codecs.sums import to_text
from fedpara_edge.errors import InputError, InvalidUpdateError, WrongBundleError, brief, brief_text
from fedpara_edge.factors.layout import Layout
from fedpara_edge.formats.history import NO_HISTORY, History
from fedpara_edge.formats.tables import max_table_bytes
from fedpara_edge.formats.weights import Weights
from fedpara_edge.options import check, option
from fedpara_edge.storage.atomic import Ready
from fedpara_edge.storage.digest import FIELD as DIGEST
from fedpara_edge.storage.digest import check_digest, with_digest
from fedpara_edge.storage.tensorfile import TensorFile, write_tensors

if TYPE_CHECKING:
    from fedpara_edge.privacy.local import Noise

FORMAT = "fedpara-edge/update"
REMEDY = "send it again"
"""Remedy for a damaged update, for the device."""
ELSEWHERE = {"fedpara-edge/partial": "give partials to finalize or merge"}
"""Remedies for files of other formats."""
MAX_CLIENT_CHARACTERS = 200
MAX_METRICS, MAX_METRIC_CHARACTERS = 64, 100


@dataclass(frozen=True, kw_only=True)
class UpdateHeader:
    """Header of an update file, without format and codec; the module describes the fields."""

    fingerprint: str = option(words="text")
    round: int = option(minimum=0, maximum=1 << 40)
    base: str = option(words="text")
    client: str = option(words="text")
    examples: int = option(minimum=1, maximum=1 << 40)
    steps: int = option(minimum=1, maximum=1 << 40)
    metrics: Mapping[str, float]
    privacy: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        try:
            check(self)
        except InputError as error:
            code = "examples" if error.key == "examples" else "header"
            raise InvalidUpdateError(str(error), code=code) from error
        if not is_valid_client_name(self.client):
            raise InvalidUpdateError(
                f"client: expected 1 to {MAX_CLIENT_CHARACTERS} printable characters, found {brief(self.client)}",
                code="header",
            )
        if not isinstance(self.metrics, dict):
            raise InvalidUpdateError(
                f"metrics: expected a mapping from names to numbers, found {brief(self.metrics)}", code="header"
            )
        if len(self.metrics) > MAX_METRICS:
            raise InvalidUpdateError(
                f"metrics: expected at most {MAX_METRICS}, found {len(self.metrics)}", code="header"
            )
        for name, value in self.metrics.items():
            if len(name) > MAX_METRIC_CHARACTERS:
                raise InvalidUpdateError(
                    f"metric {brief(name)}: expected a name of at most {MAX_METRIC_CHARACTERS} characters, found one "
                    f"of {len(name)}",
                    code="header",
                )
            # Compared, not converted: an integer from JSON can be too large for a float.
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not abs(value) <= sys.float_info.max:
                raise InvalidUpdateError(
                    f"metric {brief(name)}: expected a finite number, found {brief(value)}", code="header"
                )
        _ = self.added_noise

    @property
    def added_noise(self) -> Noise | None:
        """The noise that the device added; None for none."""
        if self.privacy is None:
            return None
        from fedpara_edge.privacy.local import stated

        try:
            return stated(self.privacy)
        except InputError as error:
            raise InvalidUpdateError(str(error), code="header") from error

    def to_json(self) -> dict[str, Any]:
        """The fields that the update has, plain data for `json.dumps`."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def sender(self) -> tuple[str, int]:
        """Client and round, of which there is one update."""
        return self.client, self.round


def is_valid_client_name(name: str) -> bool:
    """Whether a device can have this name: 1 to 200 printable characters."""
    return 1 <= len(name) <= MAX_CLIENT_CHARACTERS and name.isprintable()


@dataclass(frozen=True, kw_only=True)
class EncodedUpdate:
    """Content of an update file that is still to be written.

    Args:
        header: Header of the file, plain JSON data.
        arrays: Arrays that the codec stores, by name.
        change: Change that every reader of the file will get, float32, by shared tensor.
        seal: Function that signs the complete file before it appears under its name; None for none.
    """

    header: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]
    change: Mapping[str, NDArray[np.float32]]
    seal: Ready | None = None

    def write(self, path: Path, *, ready: Ready | None = None) -> None:
        """Write the file, atomically.

        Args:
            path: File to write.
            ready: Function called once the file is complete and signed, before it appears at `path`.

        Raises:
            FedparaError: The disk refuses the write.
        """

        def sign_and_tell(complete: Path, path: Path) -> None:
            for function in (self.seal, ready):
                if function is not None:
                    function(complete, path)

        write_tensors(path, self.arrays, self.header, ready=sign_and_tell)


def encode_update(
    header: UpdateHeader,
    layout: Layout,
    change: Mapping[str, NDArray[np.float32]],
    *,
    encoder: Encoder,
    seed: int | None = None,
) -> EncodedUpdate:
    """Encode the change of an update.

    Args:
        header: Header of the file.
        layout: Layout of the bundle; its shared tensors, and no others, are written.
        change: Change to send, float32, by name, for at least every shared tensor.
        encoder: Encoder from `codecs.find_encoder`.
        seed: Seed of random rounding; None to round to the nearest (`codecs.codec.Encoder`).

    Raises:
        InvalidUpdateError: The change is not finite, so that no server would take it.
        DivergedError: The change is too large for the codec.
    """
    tensors = in_order(layout.shared)
    if (bad := not_finite({tensor.name: change[tensor.name] for tensor in tensors})) is not None:
        raise InvalidUpdateError(
            f"tensor {bad!r}: expected a finite change, found NaN or Inf: the training diverged; lower the learning "
            "rate"
        )
    encoded = encode_change(encoder, tensors, flatten(tensors, change), seed=seed)
    codec = {"name": encoder.name, "version": encoder.version, **encoded.settings}
    fields = {"format": FORMAT, "version": 1, "codec": codec, **header.to_json(), SUMS: to_text(encoded.sums)}
    return EncodedUpdate(
        header=with_digest(fields, ""), arrays=encoded.arrays, change=unflatten(tensors, encoded.decoded)
    )


def write_update(
    path: Path,
    header: UpdateHeader,
    layout: Layout,
    change: Mapping[str, NDArray[np.float32]],
    *,
    encoder: Encoder,
    seed: int | None = None,
) -> Mapping[str, NDArray[np.float32]]:
    """Encode an update and write it (`encode_update`, `EncodedUpdate.write`); return the change that readers will get.

    Raises:
        InvalidUpdateError: The change is not finite, so that no server would take it.
        DivergedError: The change is too large for the codec.
        FedparaError: The disk refuses the write.
    """
    update = encode_update(header, layout, change, encoder=encoder, seed=seed)
    update.write(path)
    return update.change


def is_update(path: Path, header: Mapping[str, Any]) -> bool:
    """Whether a file is an update with this very header."""
    try:
        with TensorFile(path, format=FORMAT, error=InvalidUpdateError) as file:
            return file.header == header
    except InvalidUpdateError:
        return False


def read_update_round(path: Path) -> int:
    """Round of the weights from which an update was trained.

    Raises:
        InvalidUpdateError: The file is missing, truncated or not ours.
    """
    with TensorFile(path, format=FORMAT, error=InvalidUpdateError, remedy=REMEDY) as file:
        return _header_of(file).round


def open_update(path: Path, weights: Weights) -> Update:
    """Open an update file and check it in all but its values against the weights that it changes.

    Raises:
        InvalidUpdateError: The file is missing, truncated or not ours, its codec is unknown, or a tensor or field does
            not fit.
        WrongBundleError: The update was trained with another bundle, in another round or from other weights.
    """
    return Update(open_update_file(path, weights), weights)


def open_update_file(path: Path, weights: Weights) -> TensorFile:
    """Container of an update of some weights, whose header was read and nothing of it checked yet.

    Raises:
        InvalidUpdateError: The file is missing, truncated or not ours.
    """
    limit = max_table_bytes(weights.layout)
    return TensorFile(
        path, format=FORMAT, error=InvalidUpdateError, remedy=REMEDY, max_table_bytes=limit, elsewhere=ELSEWHERE
    )


class Update:
    """An open update file, checked in all but its values against the weights that it changes.

    Args:
        file: Open container, which is closed if anything is wrong.
        weights: Weights from which the update must have been trained.
        history: Past rounds from whose weights it may have been trained as well.

    Attributes:
        header: Header of the file.
        file: The open container.
        decoder: Decoder of the change.

    Raises:
        InvalidUpdateError: The codec is unknown, or a tensor or field does not fit.
        WrongBundleError: The update was trained with another bundle, in another round or from other weights.
    """

    def __init__(self, file: TensorFile, weights: Weights, history: History = NO_HISTORY) -> None:
        self.file = file
        try:
            self.header = _header_of(self.file)
            check_base(self.header, weights, history, path=file.path)
            self.decoder: Decoder = open_codec(self.file, weights.flat)
        except BaseException:
            self.file.close()
            raise

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self.file.path

    def scaled(self, parts: Sequence[tuple[int, int, float]]) -> Update:
        """The same update of the same file with a change whose parts are multiplied (`codecs.decoding.ScaledDecoder`).

        Args:
            parts: Parts of the flat change, each with its first entry, the entry after its last one, and its factor.
        """
        scaled = copy(self)
        scaled.decoder = ScaledDecoder(self.decoder, parts)
        return scaled

    def close(self) -> None:
        """Close the file; `reopen` opens it again."""
        self.file.close()

    def reopen(self) -> None:
        """Open the file again, so that thousands of updates need not be open at once.

        Raises:
            InvalidUpdateError: The file is gone or was changed.
        """
        self.file.reopen()


def check_base(header: UpdateHeader, weights: Weights, history: History, *, path: Path) -> None:
    """Compare the header of an update with the weights that it is to change.

    Args:
        header: Header of the update.
        weights: Weights of the round.
        history: Past rounds of which updates may count as well.
        path: File that has the header.

    Raises:
        WrongBundleError: The update was trained with another bundle, in another round or from other weights.
        InvalidUpdateError: It has counted in an earlier round, or another one of its client and round has.
    """
    past = history.get(header.round)
    base = weights.base if past is None else past.base
    round_ = weights.round if past is None else header.round
    for name, value in {"fingerprint": weights.fingerprint, "round": round_, "base": base}.items():
        found = getattr(header, name)
        if found != value:
            raise WrongBundleError(
                f"{path}: {name}: expected {_short(value)}, found {_short(found)}; "
                "train again from the current weights and bundle",
                code=f"wrong_{name}",
            )
    if past is not None and header.client in past.counted:
        raise InvalidUpdateError(
            f"{path}: client {header.client!r}: expected an update that has not counted, found that of round "
            f"{header.round}, which has; leave it out",
            code="duplicate",
        )


def _header_of(file: TensorFile) -> UpdateHeader:
    names = UpdateHeader.__dataclass_fields__
    missing = [name for name in names if name not in file.header and name != "privacy"]
    if missing:
        raise InvalidUpdateError(
            f"{file.path}: expected the header fields {', '.join(missing)}, found none; {REMEDY}", code="header"
        )
    unknown = file.header.keys() - {*names, "format", "version", "codec", SUMS, DIGEST}
    if unknown:
        raise InvalidUpdateError(
            f"{file.path}: expected only header fields of version 1, found {brief(min(unknown))} besides; {REMEDY}",
            code="header",
        )
    if (SUMS in file.header) != (DIGEST in file.header):
        raise InvalidUpdateError(
            f"{file.path}: expected {SUMS} and {DIGEST} in its header, found one of them; {REMEDY}", code="header"
        )
    check_digest(file, "")
    try:
        return UpdateHeader(**{name: file.header[name] for name in names if name in file.header})
    except InvalidUpdateError as error:
        raise InvalidUpdateError(f"{file.path}: {error}", code=error.code) from error


def _short(value: Any) -> str:
    return brief_text(value, max_length=12) if isinstance(value, str) else brief(value)
