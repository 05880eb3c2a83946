"""What all commands share: renamed options, suggestions, parameters in errors, exit codes, and what cron sees."""

import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest
from command_line import Command, Ended

from fedpara_edge import cli
from fedpara_edge.cli.command import Command as OurCommand
from fedpara_edge.cli.output import output_options
from fedpara_edge.errors import EXIT_CODES, BusyError, FedparaError, InputError, OutputExistsError

WEIGHTS = "bundle/weights.safetensors"
TRAIN = ("train", "bundle", "--data", "d.npz", "--client", "a", "-o", "u")


@click.command("trial", cls=OurCommand, renamed={"--parts": "--micro-batches"})
@click.argument("bundle")
@click.option("--micro-batches", type=int, default=1)
@click.option("--key")
@click.option("-o", "--output", type=click.Path(path_type=Path))
@click.option("--state", type=click.Path(path_type=Path))
@output_options
def trial(
    bundle: str,
    micro_batches: int,
    key: str,
    output: Path,
    state: Path,
    overwrite: bool,
    json: bool,
) -> None:
    """A command that fails as it is told."""
    if key == "exists":
        raise OutputExistsError(f"{output}: expected none")
    if key:
        raise InputError(f"expected another, found {micro_batches}", key=key, code="odd")
    click.echo(f"ran {bundle} {state} {overwrite} {json}")


@pytest.fixture
def attempt(run: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run that command as one of ours."""
    group = click.Group("fedpara-edge", {"trial": trial}, context_settings={"auto_envvar_prefix": "FEDPARA_EDGE"})
    monkeypatch.setattr(cli, "fedpara_edge", group)

    def call(*arguments: object) -> Ended:
        return run("trial", "b", *arguments)

    return call


def test_without_a_command_the_help_goes_to_stderr(run: Command) -> None:
    for arguments, words in (((), "Exit codes:"), (("codec",), "bench")):
        ended = run(*arguments)
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.startswith("Usage: ")
        assert words in ended.err
        assert len(ended.err.splitlines()) > 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("trian",), "No such command 'trian'. Did you mean 'train'?"),
        (("codec", "bnech"), "No such command 'bnech'. Did you mean 'bench'?"),
        (("zzz",), f"No such command 'zzz'. There are {', '.join(cli.COMMANDS)}."),
        (("train", "b", "--epoch", "2"), "--epochs"),
        (("--confg", "c.toml", "train"), "--config"),
    ],
)
def test_the_nearest_name_is_suggested(arguments: tuple[str, ...], words: str, run: Command) -> None:
    ended = run(*arguments)
    assert (ended.code, ended.out, len(ended.err.splitlines())) == (2, "", 1)
    assert words in ended.err


def test_the_help_has_every_exit_code(run: Command) -> None:
    text = run("--help").out
    for code, outcome in EXIT_CODES.items():
        assert re.search(rf"^  {code} +{outcome}$", text, re.MULTILINE)
    kinds = {kind for kind in subclasses(FedparaError) if kind.__module__ == FedparaError.__module__}
    assert {kind.exit_code: kind.outcome for kind in kinds}.items() <= EXIT_CODES.items()


def subclasses(kind: type[FedparaError]) -> Iterator[type[FedparaError]]:
    for below in kind.__subclasses__():
        yield below
        yield from subclasses(below)


def test_former_spellings_name_the_new_ones(attempt: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert attempt("--parts", "2").err == "Error: --parts is now --micro-batches\n"
    assert attempt("--parts=2").err == "Error: --parts is now --micro-batches\n"
    assert attempt("--force").err == "Error: --force is now --overwrite\n"
    monkeypatch.setenv("FEDPARA_EDGE_TRIAL_PARTS", "2")
    ended = attempt()
    assert ended == (2, "", "Error: FEDPARA_EDGE_TRIAL_PARTS is now FEDPARA_EDGE_TRIAL_MICRO_BATCHES\n")


def test_former_keys_name_the_new_ones(here: Path, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for table, message in (
        ("force = true", "train.force is now overwrite"),
        ("server-state = 'x'\nparts = 3", "train.parts is now micro_batches"),
        ("mu = 0.1", 'train.mu is now algorithm = "fedprox:mu=…"'),
    ):
        (here / "c.toml").write_text(f"[train]\n{table}\n")
        assert run("--config", "c.toml", *TRAIN) == (2, "", f"Error: c.toml: {message}\n")
    monkeypatch.setenv("FEDPARA_EDGE_TRAIN_MU", "0.1")
    assert run(*TRAIN).err == "Error: FEDPARA_EDGE_TRAIN_MU is now FEDPARA_EDGE_TRAIN_ALGORITHM=fedprox:mu=…\n"


def test_a_variable_that_is_no_option_is_not_passed_over(attempt: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPARA_EDGE_TRIAL_MICRO_BATCHS", "2")
    assert attempt() == (
        2,
        "",
        "Error: FEDPARA_EDGE_TRIAL_MICRO_BATCHS: expected the name of an option of trial; did you mean "
        "FEDPARA_EDGE_TRIAL_MICRO_BATCHES?\n",
    )
    monkeypatch.delenv("FEDPARA_EDGE_TRIAL_MICRO_BATCHS")
    monkeypatch.setenv("FEDPARA_EDGE_OTHER_X", "2")
    assert attempt().code == 0


def test_force_is_unknown_where_nothing_is_replaced(run: Command) -> None:
    assert run("doctor", "--force").err.startswith("Error: No such option '--force'")


def test_an_error_names_its_parameter_as_it_was_given(attempt: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = attempt("--key", "micro_batches", "--micro-batches", "3")
    assert ended == (2, "", "Error: --micro-batches: expected another, found 3\n")
    assert attempt("--key", "micro_batches").err == "Error: --micro-batches: expected another, found 1\n"
    assert attempt("--key", "output").err == "Error: --output: expected another, found 1\n"
    assert attempt("--key", "bundle").err == "Error: BUNDLE: expected another, found 1\n"
    assert attempt("--key", "elsewhere").err == "Error: elsewhere: expected another, found 1\n"
    monkeypatch.setenv("FEDPARA_EDGE_TRIAL_MICRO_BATCHES", "4")
    assert attempt("--key", "micro_batches").err == (
        "Error: FEDPARA_EDGE_TRIAL_MICRO_BATCHES: expected another, found 4\n"
    )


def test_an_error_names_the_key_of_the_configuration(attempt: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.fedpara_edge.context_settings, "default_map", {"trial": {"micro_batches": 5}})
    assert attempt("--key", "micro_batches").err == "Error: micro_batches in --config: expected another, found 5\n"


def test_if_missing_skips_what_is_there(attempt: Command, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert attempt("-o", output, "--if-missing").out == "ran b None False False\n"
    output.touch()
    assert attempt("-o", output, "--if-missing", "--key", "lr") == (0, f"{output}: there already, nothing to do\n", "")
    assert attempt("-o", output, "--if-missing", "--json").json == {"skipped": True, "output": str(output)}
    both = attempt("-o", output, "--if-missing", "--overwrite")
    assert (both.code, both.err) == (
        2,
        "Error: expected --overwrite or --if-missing, found both; leave one of them out\n",
    )


def test_if_missing_leaves_a_state_folder_to_the_command(attempt: Command, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ("-o", output, "--state", tmp_path, "--if-missing")
    assert attempt(*options, "--key", "exists").code == OutputExistsError.exit_code  # of another output
    output.touch()
    assert attempt(*options).out.startswith("ran b")
    assert attempt(*options, "--key", "exists", "--json").json["skipped"]


def test_every_command_that_needs_an_output_has_both_options() -> None:
    context = click.Context(cli.fedpara_edge)
    for name in cli.COMMANDS.keys() - {"simulate", "advise"}:  # which go on in a folder that is there
        command = cli.fedpara_edge.get_command(context, name)
        options = {option for parameter in command.params for option in parameter.opts}
        needs_output = any("-o" in parameter.opts and parameter.required for parameter in command.params)
        assert needs_output == ("--if-missing" in options)
        assert not needs_output or "--overwrite" in options


def test_the_second_night_of_cron(here: Path, run: Command) -> None:
    assert run(*TRAIN, "--state", "s").code == 0
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    again = run(*TRAIN, "--state", "s")
    assert again.code == OutputExistsError.exit_code == 7
    assert "pass --overwrite" in again.err
    skipped = run(*TRAIN, "--state", "s", "--if-missing", "--json")
    assert (skipped.code, skipped.json) == (0, {"skipped": True, "output": "u"})
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before
    assert run("aggregate", "u", "--weights", WEIGHTS, "-o", "w", "--if-missing").code == 0
    assert run("aggregate", "u", "--weights", "gone", "-o", "w", "--if-missing", "--json").json["skipped"]
    assert run("aggregate", "u", "--weights", WEIGHTS, "-o", "w").code == 0  # as it would write the very same
    assert run("aggregate", "u", "--weights", WEIGHTS, "-o", "w", "--algorithm", "fedavg:lr=0.5").code == 7


def test_if_missing_ends_what_was_cut_short_after_its_output(here: Path, run: Command) -> None:  # noqa: ARG001
    """A power cut between the rename of the update and the commit of the state."""
    cut = (
        "import sys\nfrom device_runtime import state\nfrom fedpara_edge.cli import main\n"
        "def stop(*_): raise KeyboardInterrupt\n"
        "state.DeviceState._waiting = stop\nmain()"
    )
    command = [*TRAIN, "--state", "s", "--codec", "int4"]
    done = subprocess.run([sys.executable, "-c", cut, *command], capture_output=True, check=False)
    assert (done.returncode, Path("u").exists(), Path("s/lasting.safetensors").exists()) == (130, True, False)
    ended = run(*command, "--if-missing", "--json")
    assert (ended.code, "skipped" in ended.json) == (0, False)
    assert Path("s/lasting.safetensors").exists()
    assert run(*command, "--if-missing", "--json").json["skipped"]


def test_a_state_in_use_may_be_tried_again(here: Path, run: Command) -> None:  # noqa: ARG001
    with in_use("s"):
        ended = run(*TRAIN, "--state", "s")
        assert ended.code == BusyError.exit_code == 75
        assert "found it in use; wait for that process" in ended.err
        assert not Path("u").exists()
    assert run(*TRAIN, "--state", "s").code == 0


@contextmanager
def in_use(folder: str) -> Iterator[None]:
    """A state folder that another process works in."""
    script = (
        "import sys; from pathlib import Path; from device_runtime.state import open_state\n"
        "with open_state(Path(sys.argv[1]), ''): print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        yield
        other.kill()


@pytest.mark.parametrize("command", [(*TRAIN, "--state", "s", "--weights"), ("aggregate", "u", "-o", "w", "--weights")])
def test_a_missing_weights_file_is_missing_input(command: tuple[str, ...], here: Path, run: Command) -> None:  # noqa: ARG001
    ended = run(*command, "gone")
    assert (ended.code, ended.err) == (
        2,
        "Error: gone: expected a readable file, found No such file or directory; check the path\n",
    )


def test_the_environment_has_the_names_of_the_options() -> None:
    context = click.Context(cli.fedpara_edge)
    commands = {name: cli.fedpara_edge.get_command(context, name) for name in cli.COMMANDS}
    commands["codec"] = commands["codec"].get_command(context, "bench")
    for command in commands.values():
        for parameter in command.params:
            names = {option.lstrip("-").replace("-", "_") for option in parameter.opts}
            assert parameter.name in names, f"{command.name} {parameter.opts}"


@pytest.mark.parametrize("group", ["codec", "data", "fleet", "keys"])
def test_a_group_lists_its_commands_in_whole_sentences(group: str, run: Command) -> None:
    listed = run(group, "--help").out.partition("Commands:\n")[2]
    assert listed
    assert "..." not in listed


def test_errors_keep_their_class_and_words_through_pickle() -> None:
    error = pickle.loads(pickle.dumps(OutputExistsError("x: expected none", code="there")))
    assert (type(error), str(error), error.code, error.exit_code) == (OutputExistsError, "x: expected none", "there", 7)
