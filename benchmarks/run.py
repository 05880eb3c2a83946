"""All benchmarks, one after the other, with their output and the machine of each in one results file.

python benchmarks/run.py                    # writes benchmarks/results.md
python benchmarks/run.py device.py          # one of them; the other sections stay
python benchmarks/run.py --quick            # small sizes, in less than 5 minutes, into benchmarks/.kept/quick.md

Each figure is printed and the results file written as soon as a part is measured. If stopped in between, the same
command resumes at the first missing part; `--again` measures all parts again.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

HERE = Path(__file__).parent
SCRIPTS = {
    "Export": "exporting.py",
    "Training on a device": "device.py",
    "Steps of an earlier exporter": "earlier.py",
    "Forms of a training step": "forms.py",
    "Lowerings of gradients": "lowerings.py",
    "Contracted linear layers": "contraction.py",
    "Frozen layers": "freezing.py",
    "Depthwise convolutions and BatchNorm": "mobile.py",
    "Inference with a folded model": "folded.py",
    "Simulated federations": "simulating.py",
    "Aggregation on the server": "aggregation.py",
    "Signatures and bounds": "signatures.py",
    "Digests and exact sums": "digests.py",
    "Server for devices": "serving.py",
    "Fleets on Flower": "fleet.py",
    "Phones in a browser": "phone.py",
    "Codecs": "codecs.py",
    "Starts of commands": "starting.py",
}
QUICK = {
    "exporting.py": ("--models", "cnn", "--repetitions", "1"),
    "device.py": ("--models", "mlp,cnn", "--repetitions", "2"),
    "earlier.py": ("--models", "cnn", "--threads", "1", "--repetitions", "2"),
    "forms.py": ("--models", "cnn", "--threads", "1", "--repetitions", "2"),
    "lowerings.py": ("--layers", "cnn *", "--repetitions", "2"),
    "contraction.py": ("--layers", "256x784", "--ranks", "8,16", "--batches", "32", "--repetitions", "3"),
    "freezing.py": ("--models", "cnn", "--repetitions", "2"),
    "mobile.py": ("--models", "DS-CNN", "--repetitions", "2"),
    "folded.py": ("--models", "mlp,cnn", "--repetitions", "2"),
    "simulating.py": ("--clients", "4", "--images", "320", "--turns", "1"),
    "aggregation.py": ("--updates", "10", "40", "--repetitions", "2"),
    "signatures.py": ("--codec", "float32", "--codec", "int4", "--updates", "20", "--repetitions", "2"),
    "digests.py": ("--updates", "10", "--parameters", "500000", "--repetitions", "2"),
    "starting.py": ("--repetitions", "3"),
    "serving.py": ("--devices", "50", "--rounds", "2"),
    "fleet.py": ("--nodes", "2", "--clients", "4", "--images", "320", "--rounds", "3"),
    "phone.py": ("--models", "mlp", "--repetitions", "2"),
    "codecs.py": ("--parameters", "500000", "--updates", "5", "--repetitions", "2", "--seconds", "0.1"),
}
"""Options that make a benchmark small."""


def sections_of(text: str) -> dict[str, str]:
    """Sections of a results file, by title."""
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)[1:]
    return {title: f"## {title}\n{content.rstrip()}\n" for title, content in zip(parts[::2], parts[1::2], strict=True)}


def run_script(title: str, script: str, options: Sequence[str], kept: Path, output: Path) -> int:
    """Run a benchmark, print its lines as they come, and write its section whenever it has grown.

    Returns:
        Exit code of the benchmark.
    """
    command = [sys.executable, "-u", str(HERE / script), *options, "--kept", str(kept)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            click.echo(line, nl=False)
            write_section(title, script, options, kept, output)
    return process.returncode


def write_section(title: str, script: str, options: Sequence[str], kept: Path, output: Path) -> None:
    """Write the report on the kept parts of a benchmark to its section of the results file."""
    if not kept.exists():
        return
    sections = sections_of(output.read_text(encoding="utf-8")) if output.exists() else {}
    shown = " ".join(["python", f"benchmarks/{script}", *(option for option in options if option != "--again")])
    measured = json.loads(kept.read_text(encoding="utf-8"))
    text = f"{measured['settings']['machine']}\n\n{measured['text'].strip()}"
    section = f"## {title}\n\n`{shown}`\n\n```text\n{text}\n```\n"
    if sections.get(title) != section:
        sections[title] = section
        _write(output, sections)


def _write(output: Path, sections: Mapping[str, str]) -> None:
    known = [sections[title] for title in SCRIPTS if title in sections]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(["# Results of `make bench`\n", *known]), encoding="utf-8")


@click.command()
@click.argument("scripts", nargs=-1, type=click.Choice(sorted(SCRIPTS.values())))
@click.option("--quick", is_flag=True, help="Small sizes, in less than 5 minutes on two cores.")
@click.option("--again", is_flag=True, help="Measure again what is kept from earlier runs.")
@click.option("--output", type=click.Path(path_type=Path), help="[default: results.md, with --quick .kept/quick.md]")
def main(scripts: tuple[str, ...], quick: bool, again: bool, output: Path | None) -> None:
    """Run SCRIPTS, all by default, and write what they report; the sections of the others stay."""
    kept = HERE / ".kept" / ("quick" if quick else "full")
    output = output or (HERE / ".kept" / "quick.md" if quick else HERE / "results.md")
    failed = []
    for title, script in SCRIPTS.items():
        if scripts and script not in scripts:
            continue
        click.echo(f"{title} ({script})")
        options = [*(QUICK[script] if quick else ()), *(["--again"] if again else [])]
        if run_script(title, script, options, (kept / script).with_suffix(".json"), output):
            failed.append(script)
    click.echo(f"written to {output}")
    if failed:
        raise click.ClickException(f"{', '.join(failed)}: ended with an error; run the same command again to resume")


if __name__ == "__main__":
    main()
