"""All benchmarks, one after the other, with their output and the machine in one results file.

python benchmarks/run.py                    # writes benchmarks/results.md
python benchmarks/run.py device.py          # one of them; the other sections stay
python benchmarks/run.py --output other.md
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import click

HERE = Path(__file__).parent
SCRIPTS = {
    "Training on a device": "device.py",
    "Lowerings of gradients": "lowerings.py",
    "Contracted linear layers": "contraction.py",
    "Inference with a folded model": "folded.py",
    "Aggregation on the server": "aggregation.py",
    "Codecs": "codecs.py",
}
PACKAGES = ("fedpara-edge", "numpy", "torch", "onnx", "onnxruntime-training-cpu", "safetensors", "zstandard")


def machine() -> str:
    """Description of the machine: processor, cores, memory and system in one line, versions in another."""
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


def sections_of(text: str) -> dict[str, str]:
    """Sections of a results file, by title."""
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)[1:]
    return {title: f"## {title}\n{content.rstrip()}\n" for title, content in zip(parts[::2], parts[1::2], strict=True)}


@click.command()
@click.argument("scripts", nargs=-1, type=click.Choice(sorted(SCRIPTS.values())))
@click.option("--output", type=click.Path(path_type=Path), default=HERE / "results.md", show_default=True)
def main(scripts: tuple[str, ...], output: Path) -> None:
    """Run SCRIPTS, all by default, and write what they print; the sections of the others are kept."""
    sections = sections_of(output.read_text(encoding="utf-8")) if output.exists() else {}
    for title, script in SCRIPTS.items():
        if scripts and script not in scripts:
            continue
        click.echo(f"{title} ({script}) ...", err=True)
        done = subprocess.run([sys.executable, HERE / script], stdout=subprocess.PIPE, text=True, check=True)
        click.echo(done.stdout)
        sections[title] = f"## {title}\n\n`python benchmarks/{script}`\n\n```text\n{done.stdout.strip()}\n```\n"
        known = [sections[name] for name in SCRIPTS if name in sections]
        output.write_text("\n".join([f"# Results of `make bench`\n\n{machine()}\n", *known]), encoding="utf-8")
    click.echo(f"written to {output}", err=True)


if __name__ == "__main__":
    main()
