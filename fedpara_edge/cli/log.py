"""Log for machines: one line of JSON for each event, appended to the file of `--log`; without the option there is none.

JSON rather than logfmt, which has no specification: its escapes keep text from a file (a client's name, a path, an
error) from ending a line or adding a field, numbers stay numbers, and every log collector reads it.

A line has `time` (UTC, ISO 8601), `level`, `event`, `pid`, and the fields of the event:

| event                 | level   | fields                                                                          |
|-----------------------|---------|---------------------------------------------------------------------------------|
| `command_started`     | info    | argv, version                                                                   |
| `tuned`               | info    | form, threads, milliseconds; of an agent message                                |
| `training_finished`   | info    | update, client, round, examples, steps, resumed_from_step, seconds, loss, bytes |
| `update_rejected`     | warning | code, message                                                                   |
| `round_written`       | info    | output, round, accepted, rejected, examples, received_bytes                     |
| `device_joined`       | info    | client                                                                          |
| `update_taken`        | info    | client, round                                                                   |
| `update_refused`      | warning | client, message; of an agent code, message                                      |
| `round_opened`        | info    | round, base                                                                     |
| `round_closed`        | info    | round, updates                                                                  |
| `update_sent`         | info    | round, bytes                                                                    |
| `unreachable`         | info    | message, again_in_seconds                                                       |
| `simulation_finished` | info    | as in `fedpara_edge.simulation.runner.Outcome`                                  |
| `error`               | error   | code, message                                                                   |
| `command_ended`       | info    | exit_code, seconds                                                              |

All go through Python's logger `fedpara_edge`, which keeps them from the root logger.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from string import Formatter
from typing import Any

from fedpara_edge.cli.output import note
from fedpara_edge.errors import counted

LOGGER = logging.getLogger("fedpara_edge")
LOGGER.addHandler(logging.NullHandler())  # or else Python prints warnings to stderr
LOGGER.propagate = False  # packages that export imports print what reaches the root

_SECRET = re.compile("token|secret|password|passphrase|credential|api-?key|private-?key", re.IGNORECASE)


def event(name: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Log an event.

    Args:
        name: Name of the event.
        level: Level of Python's `logging`.
        fields: Further values, in types of JSON; others are written as text.
    """
    LOGGER.log(level, name, extra={"fields": fields})


def filled(line: str, **fields: Any) -> str:
    """A line that tells of an event, with its fields filled in; one with a noun for its format is a number of those.

    >>> filled("round {round} from {accepted:update}", round=2, accepted=1)
    'round 2 from 1 update'
    """
    return _Filling().vformat(line, (), fields)


class _Filling(Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if len(format_spec) > 1 and format_spec.isalpha():
            return counted(value, format_spec)
        return str(super().format_field(value, format_spec))


def start(target: str) -> None:
    """Begin to log.

    Args:
        target: File to append to, or `-` for stderr.

    Raises:
        OSError: The file can't be opened.
    """
    handler = logging.StreamHandler(sys.stderr) if target == "-" else _Appending(Path(target))
    handler.setFormatter(_JsonLines())
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)


def stop() -> None:
    """End what `start` began, if it did."""
    for handler in list(LOGGER.handlers):
        if isinstance(handler.formatter, _JsonLines):
            LOGGER.removeHandler(handler)
            handler.close()
            LOGGER.setLevel(logging.NOTSET)


def without_secrets(arguments: Iterable[str]) -> list[str]:
    """Arguments of a command, with stars for values of options that sound secret and for passwords in addresses.

    >>> without_secrets(["--api-token", "abc", "--password=x", "https://me:pw@example.org/x", "--lr", "0.1"])
    ['--api-token', '***', '--password=***', 'https://***@example.org/x', '--lr', '0.1']
    """
    shown, is_value = [], False
    for argument in arguments:
        option, equals, _ = argument.partition("=")
        is_secret = not is_value and option.startswith("-") and _SECRET.search(option) is not None
        if is_value:
            shown.append("***")
        elif is_secret and equals:
            shown.append(f"{option}=***")
        else:
            shown.append(re.sub(r"(\w+://)[^/@\s]+@", r"\1***@", argument))
        is_value = is_secret and not equals
    return shown


class _JsonLines(logging.Formatter):
    """A record as one line of ASCII JSON."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {
            "time": time,
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "pid": record.process,
        }
        fields = getattr(record, "fields", {})
        line |= {name: _finite(value) for name, value in fields.items() if name not in line}
        return json.dumps(line, default=str, allow_nan=False)


class _Appending(logging.Handler):
    """A file to which each record is written at once, so that lines of several processes do not mix."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("ab", buffering=0)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._file.write(self.format(record).encode() + b"\n")
        except OSError as error:
            note(f"warning: log {self._file.name}: a line is lost: {error.strerror}")

    def close(self) -> None:
        self._file.close()
        super().close()


def _finite(value: Any) -> Any:
    """The value, or text in place of a number that JSON does not have."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
