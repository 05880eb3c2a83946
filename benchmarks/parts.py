"""Benchmarks measured part by part: each part is printed and kept as soon as it is done, and not measured again.

The file that keeps them is JSON: `settings` of all parts, the machine among them; `parts` by name, each with the time
at which it was measured, the seconds that it took and its result; and `text`, the report on the parts so far.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])
PACKAGES = ("fedpara-edge", "numpy", "torch", "onnx", "onnxruntime-training-cpu", "safetensors", "zstandard")


def machine() -> str:
    """Description of the machine in two lines: processor, cores, memory and system, then versions."""
    processor = platform.processor() or platform.machine()
    memory = ""
    if sys.platform == "linux":
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(": ")[2] if names else processor
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    return (
        f"{processor}, {os.cpu_count()} cores{memory}; {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}\n{versions}"
    )


def keep_options(function: Function) -> Function:
    """Decorator that adds the options `--kept` and `--again` to a benchmark."""
    kept = click.option("--kept", type=click.Path(path_type=Path), help="File that keeps what was measured.")
    again = click.option("--again", is_flag=True, help="Measure again what is kept.")
    return kept(again(function))


def measure_parts(
    parts: Mapping[str, Callable[[], Any]],
    report: Callable[[Mapping[str, Any]], str],
    *,
    settings: Mapping[str, Any],
    kept: Path | None = None,
    again: bool = False,
) -> dict[str, Any]:
    """Measure the parts that are not kept, in their order, and print each when it is done.

    Args:
        parts: Measurement of each part by its name; the result must be fit for JSON.
        report: Text about the results of some parts, by name.
        settings: Settings that the results depend on besides the machine; with others, nothing is taken from `kept`.
        kept: File to resume from and to keep the results in.
        again: Whether to measure everything again.

    Returns:
        Results of all parts by name.
    """
    settings = {"machine": machine(), **json.loads(json.dumps(settings))}
    found = _read(kept) if kept is not None and not again else {}
    if found and found["settings"] != settings:
        click.echo(f"{kept}: measured with other settings or on another machine; measuring everything again")
        found = {}
    done = dict(found.get("parts", {}))
    for name, measure in parts.items():
        if name in done:
            click.echo(f"{name}: kept from {done[name]['at']}")
            continue
        started = time.perf_counter()
        result = measure()
        seconds = round(time.perf_counter() - started, 1)
        done[name] = {"at": datetime.now(UTC).isoformat(" ", "seconds"), "seconds": seconds, "result": result}
        results = {part: done[part]["result"] for part in parts if part in done}
        left = len(parts) - len(results)
        text = report(results) + (f"\n\nunfinished: {left} of {len(parts)} parts are not measured yet" if left else "")
        if kept is not None:
            _write(kept, {"settings": settings, "parts": done, "text": text})
        lines = figures(result)
        click.echo(f"{name} ({seconds:.0f} s){':' if len(lines) > 1 else f': {lines[0]}'}")
        for line in lines if len(lines) > 1 else ():
            click.echo(f"  {line}")
    return {name: done[name]["result"] for name in parts}


def write_rows(path: Path | None, rows: Iterable[Any]) -> None:
    """Write the rows of a table as JSON, if there is a file for them."""
    if path is not None:
        path.write_text(json.dumps({"rows": [*rows]}, indent=1) + "\n", encoding="utf-8")


def figures(result: Any) -> list[str]:
    """Lines that list the numbers of a result, one for each of its rows.

    >>> figures([{"layer": "conv1", "ms": {"torch": 1.23456, "ours": 20000.0}}, {"layer": "fc", "ms": {}}])
    ['layer conv1, ms torch 1.23, ms ours 20000', 'layer fc']
    """
    lines = []
    for row in result if isinstance(result, list) else [result]:
        rows = [item for value in row.values() if _is_table(value) for item in value]
        lines += [", ".join(_named({name: value for name, value in row.items() if not _is_table(value)}, ""))]
        lines += figures(rows) if rows else []
    return lines


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)


def _named(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named(item, f"{name} {key}".strip())
    elif value is not None:
        number = isinstance(value, float) and (f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}")
        yield f"{name} {number or value}"


def _read(kept: Path) -> dict[str, Any]:
    return json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}


def _write(kept: Path, content: Mapping[str, Any]) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_name(f".{kept.name}")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(kept)
