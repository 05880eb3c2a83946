"""Options declared once: the fields of frozen dataclasses, each with its help and its range.

    @dataclass(frozen=True, kw_only=True)
    class Training:
        lr: float = option(0.05, help="Learning rate.", above=0)

        def __post_init__(self) -> None:
            check(self)

From such a field come the check of its value, whoever makes the dataclass; the option of the command line
(`fedpara_edge.cli.options`); the key of a plan and of a configuration file (`bind`); and the option of a codec or an
algorithm as it is typed, `uniform:step=2,by=tensor` (`choose`). All of them, and all errors, have the field's own name.

The types that a field may have are `str`, `int`, `float`, `bool`, `Path`, a `Literal` of strings, `tuple[T, ...]`,
`tuple[T, T]` and `Mapping[str, T]` of these, and each of them or None.
"""

from fedpara_edge.options.binding import bind, check_keys
from fedpara_edge.options.choosing import choose, typed
from fedpara_edge.options.declaration import Declared, check, declared, option
from fedpara_edge.options.kinds import Option

__all__ = ["Declared", "Option", "bind", "check", "check_keys", "choose", "declared", "option", "typed"]
