"""Learning rates: the ends and the middle of each shape, and what holds for all of them."""

import math
from dataclasses import replace

import pytest

from device_runtime.schedule import SHAPES, Schedule, learning_rate_at
from fedpara_edge.errors import InputError


def rates(schedule, *, steps=12, epochs=3, round=0, peak=0.5):
    schedule = replace(schedule, lr=peak)
    return [learning_rate_at(schedule, step=step, steps=steps, epochs=epochs, round=round) for step in range(steps)]


def test_constant_is_constant():
    assert rates(Schedule()) == [0.5] * 12


def test_linear_falls_by_equal_parts_to_zero_after_the_last_step():
    assert rates(Schedule(schedule="linear")) == pytest.approx([0.5 * (12 - step) / 12 for step in range(12)])


def test_cosine_is_half_a_wave():
    found = rates(Schedule(schedule="cosine"))
    assert found[0] == 0.5
    assert found[6] == pytest.approx(0.25)
    assert found[9] == pytest.approx(0.25 * (1 - math.sqrt(0.5)))
    assert [found[6 - k] + found[6 + k] for k in range(6)] == pytest.approx([0.5] * 6)


def test_steps_drop_after_whole_epochs():
    assert rates(Schedule(schedule="steps")) == pytest.approx([0.5] * 4 + [0.05] * 4 + [0.005] * 4)
    every_second = Schedule(schedule="steps", drop_every=2, drop_factor=0.5)
    assert rates(every_second) == pytest.approx([0.5] * 8 + [0.25] * 4)


@pytest.mark.parametrize("shape", ["constant", "cosine", "linear"])
def test_warmup_rises_linearly_and_the_shape_takes_up_the_rest(shape):
    found = rates(Schedule(schedule=shape, warmup_steps=4))
    assert found[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert found[4:] == pytest.approx(rates(Schedule(schedule=shape), steps=8, epochs=1))


@pytest.mark.parametrize("shape", SHAPES)
def test_each_round_multiplies_by_its_decay(shape):
    schedule = Schedule(schedule=shape, warmup_steps=2, lr_decay=0.992)
    for round in (1, 10, 200):
        assert rates(schedule, round=round) == pytest.approx([0.992**round * rate for rate in rates(schedule)])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("warmup", [0, 1, 5, 11])
def test_rates_are_positive_and_at_most_the_peak(shape, warmup):
    assert all(0 < rate <= 0.5 for rate in rates(Schedule(schedule=shape, warmup_steps=warmup)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schedule", "sine"),
        ("warmup_steps", -1),
        ("warmup_steps", 1.5),
        ("drop_every", 0),
        ("drop_factor", 0.0),
        ("drop_factor", math.nan),
        ("drop_factor", 1.1),
        ("lr_decay", 0),
        ("lr_decay", True),
    ],
)
def test_fields_out_of_range_are_refused(field, value):
    with pytest.raises(InputError, match=f"expected .*, found {value!r}"):
        Schedule(**{"schedule": "steps", field: value})


@pytest.mark.parametrize("option", ["drop_every", "drop_factor"])
def test_drops_are_refused_without_their_schedule(option):
    with pytest.raises(InputError, match=f"{option}: expected with schedule steps, found with cosine") as refused:
        Schedule(**{"schedule": "cosine", option: 1})
    assert refused.value.key == option
