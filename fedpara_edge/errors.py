"""The errors a user can cause, each with the exit code of the command line and a short code for machines.

A message names the object, what was expected, what was found and the remedy, in one line. The codes of an update that
is refused, as they stand in reports:

| code                | the update file                                                              |
|---------------------|------------------------------------------------------------------------------|
| `unreadable`        | does not exist, is no regular file, or can't be read                         |
| `truncated`         | ends too early                                                               |
| `not_safetensors`   | is damaged, or of another kind                                               |
| `wrong_format`      | is safetensors without our header, of another format or of another version   |
| `header`            | lacks a header field, or has one with an impossible value                    |
| `examples`          | states an impossible number of examples                                      |
| `wrong_fingerprint` | was trained with another bundle                                              |
| `wrong_round`       | was trained in another round                                                 |
| `wrong_base`        | was trained from other weights                                               |
| `wrong_algorithm`   | was trained with another algorithm than the server's, or other options       |
| `metrics`           | has a metric that can't be right beside those of the others                  |
| `unknown_codec`     | is encoded in a way this release does not know                               |
| `missing_tensor`    | lacks a shared tensor                                                        |
| `extra_tensor`      | has a tensor that is not shared                                              |
| `payload`           | is encoded and damaged                                                       |
| `dtype`, `shape`    | has a tensor of another dtype or shape                                       |
| `order`             | has its tensors in another order than the codec lays them                    |
| `duplicate`         | has the same client and the same content as one that was taken               |
| `conflict`          | has the same client as another with other content: both are refused          |
| `changed`           | was changed while it was being read                                          |
| `digest`            | has other content than was written                                         |
| `partial`           | is a partial that is damaged, or contradicts another file                    |
| `unsigned`          | has no signature, where signed ones count                                    |
| `unknown_client`    | is signed by nobody on the list of clients                                   |
| `forged`            | has a signature that is not that of its client and content                   |
| `revoked`           | is signed with a key that was revoked                                        |
| `replay`            | is of another run, or another update of the client was accepted for its round |
| `no_noise`          | states no noise of its device, where such noise is asked for               |
| `budget`            | takes more than what is left of its client's privacy budget                |
| `over_cap`          | claims more examples than its client may                                     |
| `not_finite`        | has a change that is NaN or infinite                                         |
| `overflow`          | has a change so large that the weights become infinite                       |
| `exploded`          | has factors that compose to weights far beyond those before                  |
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar


class FedparaError(Exception):
    """Base of every error raised on purpose.

    Args:
        message: Object, expectation, finding and remedy, in one line.
        code: One word for machines; None for that of the class.

    Attributes:
        exit_code: Exit code of the command line.
        outcome: Meaning of the exit code, in a few words.
    """

    exit_code = 1
    outcome = "failure"
    code = "failure"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class DivergedError(FedparaError):
    """A training, or weights, left the finite numbers: exit code 1."""

    code = "diverged"


class InputError(FedparaError):
    """An argument, a data file, a model or an option does not fit: exit code 2.

    Args:
        detail: Expectation, finding and remedy, in one line; after the object where there is no key.
        key: Name of the option at fault, as Python spells it; dotted where tables are nested. The message begins with
            it. The command line puts its own spelling there.
        code: Word for machines; None for that of the class.
    """

    exit_code = 2
    outcome = "usage or input"
    code = "input"

    def __init__(self, detail: str, *, key: str | None = None, code: str | None = None) -> None:
        super().__init__(detail if key is None else f"{key}: {detail}", code=code)
        self.detail = detail
        self.key = key

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), key=self.key, code=self.code), (self.detail,)

    def about(self, key: str) -> InputError:
        """The same error about another option, whose value the first one is made from."""
        return type(self)(self.detail, key=key, code=self.code)

    def under(self, prefix: str) -> InputError:
        """The same error about an option that lies in a table of that name.

        >>> str(InputError("expected a number", key="lr").under("train"))
        'train.lr: expected a number'
        """
        return type(self)(self.detail, key=prefix if self.key is None else f"{prefix}.{self.key}", code=self.code)


class OutputExistsError(InputError):
    """An output exists and is not to be replaced: exit code 7."""

    exit_code = 7
    outcome = "output exists already"
    code = "output_exists"


class InvalidUpdateError(FedparaError):
    """An update file can't be used: exit code 3."""

    exit_code = 3
    outcome = "invalid update"
    code = "invalid"


class TooFewUpdatesError(FedparaError):
    """Fewer valid updates than asked for: exit code 4.

    Args:
        message: Object, expectation, finding and remedy, in one line.
        rejected: Errors of the updates that were refused.
    """

    exit_code = 4
    outcome = "too few updates"
    code = "too_few"

    def __init__(self, message: str, *, rejected: Sequence[FedparaError] = ()) -> None:
        super().__init__(message)
        self.rejected = tuple(rejected)


class TrustError(FedparaError):
    """A signature is missing or forged, or what is signed is old, expired, replayed or changed: exit code 5."""

    exit_code = 5
    outcome = "signature, replay or rollback"
    code = "signature"


class WrongBundleError(FedparaError):
    """A bundle, weights or update file does not belong with the others, or was changed: exit code 6."""

    exit_code = 6
    outcome = "wrong base or bundle"
    code = "wrong_bundle"


class BudgetError(FedparaError):
    """A round would take more than what is left of a privacy budget: exit code 8."""

    exit_code = 8
    outcome = "privacy budget spent"
    code = "budget"


class BusyError(FedparaError):
    """A state or run folder is in use by another process: exit code 75, which is EX_TEMPFAIL.

    It is no `InputError`: the same command succeeds later.
    """

    exit_code = 75
    outcome = "in use by another process, try again later"
    code = "busy"


AnyError = TypeVar("AnyError", bound=FedparaError)

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM."""

EXIT_CODES: Mapping[int, str] = {
    0: "done",
    **{
        kind.exit_code: kind.outcome
        for kind in (
            FedparaError,
            InputError,
            InvalidUpdateError,
            TooFewUpdatesError,
            TrustError,
            WrongBundleError,
            OutputExistsError,
            BudgetError,
            BusyError,
        )
    },
    INTERRUPTED: "interrupted",
}
"""Meaning of every exit code of the command line."""


def detached(error: AnyError) -> AnyError:
    """An error to keep: without the frames and causes that hold in memory what was being read when it was raised."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def brief(value: Any, *, max_length: int = 60) -> str:
    """The `repr` of a value from a file, fit for a message: one line of at most `max_length` characters.

    >>> brief("3"), brief([1, 2]), brief("line\\n" * 9, max_length=7)
    ("'3'", '[1, 2]', "'line\\\\n…")
    """
    try:
        text = repr(value[: max_length + 1] if isinstance(value, str) else value)
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= max_length else f"{text[:max_length]}…"


def brief_text(value: Any, *, max_length: int = 60) -> str:
    """As `brief`, but text that is printable and not blank goes without quotes.

    >>> brief_text("fedpara-edge/update"), brief_text("\\x1b[2J"), brief_text("0123456789", max_length=4)
    ('fedpara-edge/update', "'\\\\x1b[2J'", '0123…')
    """
    if not isinstance(value, str) or not value.isprintable() or not value.strip():
        return brief(value, max_length=max_length)
    return value if len(value) <= max_length else f"{value[:max_length]}…"


def counted(number: int, noun: str) -> str:
    """A number of things in words, in the plural but for 1.

    >>> counted(1, "update"), counted(0, "entry"), counted(1000, "class")
    ('1 update', '0 entries', '1000 classes')
    """
    if number == 1:
        return f"{number} {noun}"
    return f"{number} {noun[:-1]}ies" if noun.endswith("y") else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that is most like a mistaken one, for the message that refuses it; None if none is.

    >>> nearest("trian", ("train", "aggregate"))
    'train'
    """
    from difflib import get_close_matches  # 10 ms that a command without a mistake need not spend

    return next(iter(get_close_matches(name, known, n=1)), None)
