"""What a command prints: safe for a terminal whatever is in it, and no other exit code where it can't be printed."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import small_round
from command_line import Command

from fedpara_edge.cli import COMMANDS
from fedpara_edge.cli.streams import drawing, printable, safe_streams
from fedpara_edge.formats.weights import Weights

EVIL = "e\x1b[2J\x1b]0;owned\x07\r\u202e\x9b31m\udcff\u2028b"
ESCAPED = r"e\x1b[2J\x1b]0;owned\x07\r\u202e\x9b31m\udcff\u2028b"


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Weights:
    monkeypatch.chdir(tmp_path)
    return small_round.start_round(tmp_path)


def is_safe(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def test_what_is_printed_on_both_streams_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    with safe_streams():
        for stream in (sys.stdout, sys.stderr):
            print(f"{EVIL}\tété…", file=stream)
    assert capsys.readouterr() == (f"{ESCAPED}\tété…\n",) * 2
    assert printable(EVIL) == ESCAPED


def test_bytes_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    """As click writes the scripts of shell completion."""
    with safe_streams():
        click.echo("été\n\x1b[2J".encode())
    assert capsys.readouterr().out == "été\n\\x1b[2J\n"


def test_what_draws_is_let_through(capsys: pytest.CaptureFixture[str]) -> None:
    with safe_streams():
        drawing(sys.stderr).write("\r\x1b[K12 %")
    assert capsys.readouterr().err == "\r\x1b[K12 %"
    assert drawing(sys.stdout) is sys.stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_of_another_encoding_gets_escapes(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    with safe_streams():
        print("é…", flush=True)
    assert written.getvalue() == {"ascii": b"\\xe9\\u2026\n", "latin-1": b"\xe9\\u2026\n"}[encoding]


@pytest.mark.parametrize("json_option", [(), ("--json",)])
def test_names_of_updates_reach_no_terminal(weights: Weights, run: Command, json_option: tuple[str, ...]) -> None:
    names = [small_round.send(Path(), weights, client, name=f"{EVIL}{client}") for client in "abc"]
    many = small_round.send(Path(), weights, "d", name=f"{EVIL}d", examples=10_000)
    bad = Path(f"{EVIL}bad")
    bad.write_bytes(b"")
    ended = run(
        "--log", f"{EVIL}log", "aggregate", *names, many, bad, "--weights", "base.safetensors", "-o", EVIL, *json_option
    )
    assert ended.code == 0
    assert is_safe(ended.out + ended.err)
    in_one_line = ESCAPED.replace(r"\r", " ").replace(r"\u2028", " ")
    assert f"rejected [truncated] {in_one_line}bad: " in ended.err
    assert f"outlier {in_one_line}d.update: client 'd': " in ended.err
    if json_option:
        assert ended.json["output"] == EVIL
    events = [json.loads(line) for line in Path(f"{EVIL}log").read_text().splitlines()]
    assert EVIL in events[0]["argv"]
    assert events[-1]["exit_code"] == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_prints_a_name_as_it_is(name: str, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (
        (name, EVIL),
        (name, EVIL, EVIL),
        (name, f"--{EVIL}"),
        ("--config", EVIL, name),
        ("--log", f"{EVIL}/x", name),
    ):
        ended = run(*arguments)
        assert ended.code in (2, 6) or (name == "doctor" and ended.code == 0)
        assert is_safe(ended.out + ended.err)


CALL = [sys.executable, "-c", "import sys; from fedpara_edge.cli import main; main()"]
SHELL = 'exec "$@"'


def ends(redirected: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command with streams redirected by a shell."""
    done = subprocess.run(
        ["sh", "-c", f"{SHELL} {redirected}", "sh", *CALL, *arguments], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
class TestBrokenStreams:
    """Streams that are closed, or on a full disk."""

    @pytest.mark.parametrize("redirected", ["2>&-", "2>/dev/full"])
    def test_without_stderr_the_exit_code_stays(self, weights: Weights, redirected: str) -> None:  # noqa: ARG002
        assert ends(redirected, "inspect", "nowhere") == (2, "", "")
        code, out, _ = ends(redirected, "inspect", "base.safetensors", "--json")
        assert (code, json.loads(out)["round"]) == (0, 3)

    def test_without_stderr_files_are_whole(self, weights: Weights) -> None:
        """The number of a closed stderr is given to no file that a command writes."""
        update = small_round.send(Path(), weights, "a")
        arguments = ("aggregate", str(update), "gone", "--weights", "base.safetensors", "-o")
        assert ends("2>&-", *arguments, "one")[0] == ends("", *arguments, "other")[0] == 0
        assert Path("one").read_bytes() == Path("other").read_bytes()

    def test_a_full_stdout_is_a_failure(self, weights: Weights) -> None:  # noqa: ARG002
        code, _, err = ends(">/dev/full", "inspect", "base.safetensors")
        assert (code, err) == (
            1,
            "Error: stdout: expected to write the result, found No space left on device; free space or choose another "
            "place\n",
        )
        assert ends(">/dev/full 2>/dev/full", "inspect", "base.safetensors")[0] == 1

    def test_a_closed_stdout_is_none(self, weights: Weights) -> None:  # noqa: ARG002
        assert ends(">&-", "inspect", "base.safetensors") == (0, "", "")
        assert ends(">&- 2>&- <&-", "inspect", "nowhere")[0] == 2

    def test_a_reader_that_goes_away_is_no_failure(self, weights: Weights) -> None:  # noqa: ARG002
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [*CALL, "inspect", "base.safetensors"], stdout=write, stderr=subprocess.PIPE, text=True, check=False
        )
        os.close(write)
        assert (done.returncode, done.stderr) == (0, "")


def test_bytes_that_are_no_text_are_names_too(here: Path, run: Command) -> None:  # noqa: ARG001
    """A round with files whose names are not UTF-8."""
    odd = "n\udcff\udce9"
    shutil.copytree(Path("bundle").resolve(), odd)
    np.savez(f"{odd}.npz", **np.load("d.npz"))
    commands = (
        ("train", odd, "--data", f"{odd}.npz", "-o", f"{odd}.u", "--state", f"{odd}.s", "--batch-size", 4),
        ("aggregate", f"{odd}.u", "--weights", f"{odd}/weights.safetensors", "-o", f"{odd}.w"),
        ("evaluate", odd, "--weights", f"{odd}.w", "--data", f"{odd}.npz"),
        ("fold", odd, "--weights", f"{odd}.w", "-o", f"{odd}.onnx"),
        ("predict", f"{odd}.onnx", "--data", f"{odd}.npz", "-o", f"{odd}.npy"),
        ("inspect", odd),
        ("inspect", f"{odd}.s"),
        ("inspect", f"{odd}.onnx"),
        ("split", f"{odd}.npz", "-o", f"{odd}.d", "--clients", 2),
    )
    for command in commands:
        for option in ((), ("--json",)):
            ended = run(*command, *option, *(("--overwrite",) if "-o" in command and option else ()))
            assert (ended.code, ended.err if ended.code else "") == (0, ""), command
            assert is_safe(ended.out + ended.err)
    assert Path(f"{odd}.npy").exists()


def test_tables_and_pictures_of_such_names(weights: Weights, run: Command) -> None:
    odd = "n\udcff"
    Path(f"{odd}.csv").write_text("a,y\n1,0\n2,1\n3,0\n4,1\n")
    assert (
        run("split", f"{odd}.csv", "-o", f"{odd}.d", "--clients", 2, "--split", "iid", "--label-column", "y").code == 0
    )
    update = small_round.send(Path(), weights, "a", name=odd)
    bench = ("codec", "bench", update, "--weights", "base.safetensors", "--codec", "float32", "--seconds", 0.001)
    assert run(*bench, "--plot", f"{odd}.svg").code == 0
    assert r"n\udcff.update" in Path(f"{odd}.svg").read_text()
