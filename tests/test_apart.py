"""The second process of the exporter: it answers, raises what was raised there, and its crash is an error here."""

import operator
import os
import signal

import numpy as np
import pytest

from export.apart import Apart, CrashError, apart, prepare
from fedpara_edge.errors import InputError

CRASHES = {
    "a signal": (lambda: apart(os.kill, apart(os.getpid), signal.SIGSEGV), "ends the process with SIGSEGV"),
    "an exit": (lambda: apart(os._exit, 3), "ends the process with exit code 3"),
}


def test_it_is_another_process_and_the_same_one_each_time() -> None:
    assert os.getpid() != apart(os.getpid) == apart(os.getpid)


def test_arrays_go_there_and_back() -> None:
    array = np.arange(1_000_000, dtype=np.float32)
    np.testing.assert_array_equal(apart(np.negative, array), -array)


def test_what_is_raised_there_is_raised_here() -> None:
    with pytest.raises(ZeroDivisionError, match="division"):
        apart(operator.truediv, 1, 0)
    with pytest.raises(InputError, match=r"^tokens: expected one$") as raised:
        apart(refuse)
    assert raised.value.key == "tokens"
    assert apart(abs, -1) == 1


def refuse() -> None:
    raise InputError("expected one", key="tokens")


def test_exceptions_that_can_not_travel_keep_their_text() -> None:
    with pytest.raises(RuntimeError, match="as it was"):
        apart(fail)


def fail() -> None:
    class LocalError(Exception):
        pass

    raise LocalError("as it was")


@pytest.mark.parametrize("name", CRASHES)
def test_a_crash_is_an_error_after_which_it_starts_anew(name: str) -> None:
    crash, message = CRASHES[name]
    before = apart(os.getpid)
    with pytest.raises(CrashError, match=message):
        crash()
    assert apart(os.getpid) != before


def test_objects_stay_there() -> None:
    numbers = Apart(list, [3, 1, 2])
    numbers.call("sort")
    assert numbers.call("index", 3) == 2
    other = Apart(list, [])
    assert other.call("__len__") == 0
    del numbers
    assert apart(abs, -1) == 1
    assert other.call("__len__") == 0


def test_preparing_does_not_wait_and_forgives_what_is_not_installed() -> None:
    prepare("json", "no_such_module")
    assert apart(abs, -1) == 1
