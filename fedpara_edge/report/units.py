"""Numbers as the report writes them, with as many digits as they deserve."""

from __future__ import annotations


def percent(share: float, digits: int = 1) -> str:
    """Share in percent.

    >>> percent(0.8234), percent(0.00123, 2)
    ('82.3 %', '0.12 %')
    """
    return f"{100 * share:.{digits}f} %"


def size(count: float) -> str:
    """Bytes in decimal units, with three digits.

    >>> [size(count) for count in (0, 999, 123_456, 12_345_678, 205.3e9, 999_999)]
    ['0 B', '999 B', '123 kB', '12.3 MB', '205 GB', '1.00 MB']
    """
    for unit, scale in (("B", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9)):
        if count < 999.5 * scale:
            return f"{count:.0f} B" if unit == "B" else f"{digits(count / scale)} {unit}"
    return f"{digits(count / 1e12)} TB"


def seconds(count: float) -> str:
    """Seconds with three digits.

    >>> seconds(471.84), seconds(0.0123)
    ('472 s', '0.0123 s')
    """
    return f"{digits(count)} s"


def ratio(count: float) -> str:
    """Factor, such as 10.1×.

    >>> ratio(10.12), ratio(0.987), ratio(120.4)
    ('10.1×', '0.99×', '120×')
    """
    return f"{count:.0f}×" if count >= 99.95 else f"{count:.1f}×" if count >= 1.995 else f"{count:.2f}×"


def digits(number: float) -> str:
    """Number with three digits, without an exponent unless it is tiny.

    >>> [digits(number) for number in (1234.6, 99.96, 9.996, 0.5, 0.00012, 0.0)]
    ['1,235', '100', '10.0', '0.500', '0.00012', '0']
    """
    magnitude = abs(number)
    if magnitude == 0:
        return "0"
    if magnitude >= 99.95:
        return f"{number:,.0f}"
    if magnitude >= 9.995:
        return f"{number:.1f}"
    return f"{number:.2f}" if magnitude >= 0.995 else f"{number:.3g}" if magnitude < 0.0995 else f"{number:.3f}"
