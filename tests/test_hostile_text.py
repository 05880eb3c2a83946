"""Text files that anybody may have written: JSON and TOML that are too deep, too long or of other types."""

import json
import math
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_plan
from journal_lines import NEEDED

from fedpara_edge.aggregation.config import AggregateConfig
from fedpara_edge.errors import InputError
from fedpara_edge.formats.transcript import read_transcript
from fedpara_edge.options import check
from fedpara_edge.report.rows import read_metrics
from fedpara_edge.simulation.data.clients import INDEX, read_clients
from fedpara_edge.simulation.data.federation import DataPlan
from fedpara_edge.simulation.data.holdout import fewest_rows
from fedpara_edge.simulation.metrics import Journal
from fedpara_edge.simulation.plan.plan import read_plan
from fedpara_edge.storage.tomlfile import read_toml
from fedpara_edge.trust.clients import read_clients as read_list
from fedpara_edge.trust.ledger import open_ledger

DEEP_JSON = "[" * 200_000
DEEP_TOML = f"a = {'[' * 200_000}"


def refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", [DEEP_TOML, "a = " + "{b = " * 100_000, "\xff", "a ="])
@pytest.mark.parametrize("read", [read_plan, read_list])
def test_toml_that_is_none(text: str, read: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "file.toml"
    path.write_bytes(text.encode("latin-1"))
    refused(lambda: read(path), r"file\.toml: expected a .*TOML.*, found ")


@pytest.mark.parametrize("text", ["a." * 50_000 + "a = 1", "[" + "a ." * 50_000 + "a]", "x = {" + "a.'b'." * 50_000])
def test_keys_of_many_parts_take_no_time(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file.toml"
    path.write_text(f"{tiny_plan.PLAN}\n{text}")
    started = time.process_time()
    refused(lambda: read_plan(path), r"file\.toml: expected a plan in TOML, found values that are nested too deeply")
    assert time.process_time() - started < 2


def test_toml_that_is_some(tmp_path: Path) -> None:
    text = f"a = [{'0.1, ' * 999}]\nb.c.d = 1\n# {'. ' * 999}{'.' * 999}\n[d]\ne = '{'.' * 999}'\n"
    (tmp_path / "file").write_text(text)
    assert read_toml(tmp_path / "file") == tomllib.loads(text)


HUGE = ("1" + "0" * 30, "1" + "0" * 400, "-1" + "0" * 30, "1e999", "nan")


LINES = ("rounds = 2", "seeds = [4]", "participants = 2", "clients = 3", "batch_size = 8", "gamma = 0.5", "lr = 0.1")


@pytest.mark.parametrize(
    ("line", "value"), [(line, value) for line in LINES for value in HUGE if (line, value) != (LINES[-1], HUGE[0])]
)
def test_numbers_that_nothing_can_hold(line: str, value: str, tmp_path: Path) -> None:
    key, _, old = line.partition(" = ")
    new = f"[{value}]" if old.startswith("[") else value
    (tmp_path / "plan.toml").write_text(tiny_plan.PLAN.replace(f"{line}\n", f"{key} = {new}\n", 1))
    refused(lambda: read_plan(tmp_path / "plan.toml"), rf"plan\.toml: .*{key}.*: expected .*, found ")


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_integers_are_no_numbers_beyond_all_floats(value: int) -> None:

    with pytest.raises(InputError, match="max_norm: expected"):
        AggregateConfig(max_norm=value)


@pytest.mark.parametrize("min_examples", [10**12, (1 << 63) - 1])
def test_a_huge_number_of_examples_takes_no_time(min_examples: int) -> None:
    started = time.process_time()
    for share in (1e-9, 0.2, 0.5, math.nextafter(1.0, 0.0)):
        assert fewest_rows(min_examples, share) > min_examples
    plan = DataPlan(path=Path("d"), split="iid", clients=3, test_share=0.5, min_examples=min_examples)
    check(plan)
    assert time.process_time() - started < 1


def test_as_many_rows_as_by_counting() -> None:
    def counted(min_examples: int, share: float) -> int:
        rows = min_examples + 1
        while rows - min(rows - 1, max(1, math.ceil(share * rows - 0.5))) < min_examples:
            rows += 1
        return rows

    for share in (0.01, 0.2, 1 / 3, 0.5, 0.75, 0.99):
        assert [fewest_rows(n, share) for n in range(1, 60)] == [counted(n, share) for n in range(1, 60)]


WHOSE = {"arm": "a", "seed": 4}
GOOD = {"event": "round", **WHOSE, "round": 1, **NEEDED["round"]}


@pytest.mark.parametrize(
    "line",
    [
        DEEP_JSON,
        "3",
        "[]",
        "{",
        "\xff",
        *(
            json.dumps({**GOOD, **change})
            for change in ({"event": []}, {"event": "x"}, {"arm": 3}, {"seed": "4"}, {"seed": True}, {"round": "1"})
        ),
        json.dumps({"event": "round", **WHOSE, **NEEDED["round"]}),
        json.dumps({"event": "done", **WHOSE, "rounds": 1, "diverged": 3}),
    ],
    ids=lambda line: line[:60],
)
def test_a_journal_with_a_foreign_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    content = json.dumps(GOOD).encode() + b"\n" + line.encode("latin-1") + b"\n"
    path.write_bytes(content)
    refused(lambda: Journal(path), r"metrics\.jsonl: line 2: expected one metric with its fields, found ")
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("line", "field"),
    [
        *((GOOD, field) for field in NEEDED["round"]),
        ({"event": "arm", **WHOSE, "shared_parameters": 3}, "shared_parameters"),
        ({"event": "done", **WHOSE, "rounds": 3, "diverged": None}, "rounds"),
        ({"event": "done", **WHOSE, "rounds": 3, "diverged": None}, "diverged"),
    ],
)
def test_a_metric_without_a_field_is_refused_and_not_taken_for_nothing(
    line: dict[str, Any], field: str, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(line)}\n")
    assert Journal(path).events == [GOOD, line]
    less = {name: value for name, value in line.items() if name != field}
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(less)}\n")
    refused(
        lambda: Journal(path), rf"metrics\.jsonl: line 2: expected one metric with its fields, found no field '{field}'"
    )


def test_a_report_of_a_deep_line(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(tiny_plan.PLAN)
    (tmp_path / "metrics.jsonl").write_text(f"{DEEP_JSON}\n{{}}\n")
    refused(lambda: read_metrics(tmp_path), r"metrics\.jsonl: line 1: expected a JSON object, found damaged text")


@pytest.mark.parametrize(
    "text", [DEEP_JSON, "", "[]", '{"clients": 3}', '{"clients": [{}]}', '{"clients": []}', "\xff"]
)
def test_a_damaged_index_of_clients(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    refused(lambda: read_clients(tmp_path), "expected the clients of a run, found a damaged file; run the plan")


@pytest.mark.parametrize("text", [DEEP_JSON, "", "[]", "{}", '{"format": 1}', "\xff"])
def test_a_damaged_ledger_or_transcript(text: str, tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    with open_ledger(tmp_path / "ledger", "run") as ledger:
        ledger._path(3).write_bytes(text.encode("latin-1"))
        refused(lambda: ledger.accepted(3), "expected the ledger of round 3, found a damaged file")
    (tmp_path / "t").write_bytes(text.encode("latin-1"))
    refused(lambda: read_transcript(tmp_path / "t"), "expected a transcript of a round, found another file")
