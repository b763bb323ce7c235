"""Every form of the on-chip collectives: right for any size and operator, free of races, and as costly as stated."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseline.collectives.on_chip import costs, forms, order
from fuseline.collectives.on_chip.machine import Machine, ScheduleError
from fuseline.collectives.on_chip.schedule import Arm, ClusterBarrier, Schedule, Send, Wait, WaitSent

SIZES = (1, 2, 4, 8, 16)
Form = Callable[[int, int, int], Schedule]
FORMS: dict[str, Form] = {
    "reduce_one_shot": forms.reduce_one_shot,
    "reduce_one_shot by copy": lambda n, size, epochs: forms.reduce_one_shot(n, size, epochs, by_copy=True),
    "gather_one_shot": forms.gather_one_shot,
    "gather_one_shot by copy": lambda n, size, epochs: forms.gather_one_shot(n, size, epochs, by_copy=True),
    "reduce_log2": forms.reduce_log2,
    "reduce_log2 with a slot a round": lambda n, size, epochs: forms.reduce_log2(
        n, size, epochs, round_slots=True, round_barrier=False
    ),
    "gather_log2": forms.gather_log2,
    "reduce_scatter": lambda n, size, epochs: forms.reduce_scatter(n, n * size, epochs),
    "reduce_exchange": forms.reduce_exchange,
}
IN_RANK_ORDER = frozenset(form for form in FORMS if "log2" not in form)
# Each leaves one protection out. What the proof must say, and the exploration find.
BROKEN: dict[str, Form] = {
    "one set of slots": lambda n, size, epochs: forms.reduce_one_shot(n, size, epochs, slot_sets=1),
    "one set of segments": lambda n, size, epochs: forms.gather_one_shot(n, size, epochs, slot_sets=1),
    "one source of copies": lambda n, size, epochs: forms.reduce_one_shot(
        n, size, epochs, by_copy=True, source_sets=1
    ),
    "no second barrier": lambda n, size, epochs: forms.reduce_log2(n, size, epochs, round_barrier=False),
    "adding while sending": lambda n, size, epochs: forms.reduce_log2(n, size, epochs, wait_sent=False),
    "reading sums too early": lambda n, size, epochs: forms.reduce_scatter(n, n, epochs, second_wait=False),
    "one set of exchanged sums": lambda n, size, epochs: forms.reduce_exchange(n, size, epochs, slot_sets=1),
    "one mbarrier for all rounds": lambda n, size, epochs: forms.gather_log2(n, size, epochs, round_barriers=False),
}


def contributions(schedule: Schedule) -> list[list[list[tuple[Any, ...]]]]:
    """Inputs that record themselves: reducing by ``+`` shows who contributed, in which order, for any operator."""
    return [
        [[((epoch, rank, i),) for i in range(schedule.num_elements)] for rank in range(schedule.num_ctas)]
        for epoch in range(schedule.num_epochs)
    ]


def in_any_order(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(sorted(a + b))


def in_rank_order(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    return a + b


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_ctas", SIZES)
def test_no_interleaving_has_a_race_or_a_wrong_result(form: str, num_ctas: int) -> None:
    """Without races all executions agree, so that one with the right result speaks for all."""
    schedule = FORMS[form](num_ctas, 2, order.epochs_to_prove(2))
    assert order.races(schedule) == []
    Machine(schedule, contributions(schedule), in_any_order).run(0)


@pytest.mark.parametrize("form", BROKEN)
@pytest.mark.parametrize("num_ctas", [2, 4, 16])
def test_a_protection_left_out_is_named(form: str, num_ctas: int) -> None:
    assert order.races(BROKEN[form](num_ctas, 1, 4))


@pytest.mark.parametrize("form", BROKEN)
def test_a_protection_left_out_gives_wrong_results_in_some_interleaving(form: str) -> None:
    schedule = BROKEN[form](4 if form == "one mbarrier for all rounds" else 2, 1, 4)
    with pytest.raises(ScheduleError):
        Machine(schedule, contributions(schedule), in_any_order).explore(100_000)


@pytest.mark.parametrize(
    ("form", "num_ctas", "epochs"),
    [(form, 2, 4) for form in FORMS] + [("reduce_one_shot", 3, 2), ("gather_one_shot", 3, 2), ("reduce_log2", 4, 1)],
)
def test_all_interleavings_of_small_clusters_give_the_result(form: str, num_ctas: int, epochs: int) -> None:
    schedule = FORMS[form](num_ctas, 1, epochs)
    combine = in_rank_order if form in IN_RANK_ORDER else in_any_order
    assert Machine(schedule, contributions(schedule), combine).explore(100_000) > 100


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMS)),
    num_ctas=st.sampled_from(SIZES),
    size=st.integers(1, 5),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_everyone_contributes_once_for_any_operator(
    form: str, num_ctas: int, size: int, epochs: int, seed: int
) -> None:
    schedule = FORMS[form](num_ctas, size, epochs)
    combine = in_rank_order if form in IN_RANK_ORDER else in_any_order
    Machine(schedule, contributions(schedule), combine).run(seed)


@settings(max_examples=30, deadline=None)
@given(
    num_ctas=st.integers(1, 9),
    values=st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=9, max_size=9),
    operator=st.sampled_from([np.add, np.maximum]),
    seed=st.integers(0, 2**32),
)
def test_one_shot_has_the_bits_of_a_fold_in_rank_order(
    num_ctas: int, values: list[float], operator: np.ufunc, seed: int
) -> None:
    inputs = [[[np.float32(value)] for value in values[:num_ctas]]]
    Machine(forms.reduce_one_shot(num_ctas, 1, 1), inputs, operator).run(seed)


@pytest.mark.parametrize("num_ctas", SIZES)
def test_one_set_of_slots_is_enough_where_owners_rotate(num_ctas: int) -> None:
    schedule = forms.reduce_rotating(num_ctas, 1, 2 * num_ctas + 2)
    assert order.races(schedule) == []
    Machine(schedule, contributions(schedule), in_rank_order).run(0)


def test_one_set_of_slots_is_not_enough_for_one_owner() -> None:
    schedule = forms.reduce_rotating(2, 1, 3, owners_rotate=False)
    assert order.races(schedule)
    with pytest.raises(ScheduleError):
        Machine(schedule, contributions(schedule), in_rank_order).explore(10_000)


def test_log2_gives_every_cta_other_bits() -> None:
    """Why the kernels do not use it: (a + b) + (c + d) is another float at each rank."""
    inputs = [[[np.float32(value)] for value in (1e8, 1.0, -1e8, 1.0)]]
    with pytest.raises(ScheduleError, match="CTA"):
        Machine(forms.reduce_log2(4, 1, 1), inputs, np.add).run(0)


@settings(max_examples=80, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMS)),
    num_ctas=st.integers(2, 3),
    left_out=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), min_size=1, max_size=2),
)
def test_whatever_goes_wrong_the_proof_has_said_before(
    form: str, num_ctas: int, left_out: list[tuple[int, int]]
) -> None:
    """Waits and sends dropped at random: an execution fails only where the proof found something."""
    num_ctas = num_ctas if form in ("reduce_one_shot", "gather_one_shot") else 2
    whole = FORMS[form](num_ctas, 1, 2)
    programs = [list(program) for program in whole.programs]
    for rank, number in left_out:
        program = programs[rank % num_ctas]
        protections = [op for op in program if isinstance(op, Arm | ClusterBarrier | Send | Wait | WaitSent)]
        program.remove(protections[number % len(protections)])
    schedule = Schedule(tuple(tuple(program) for program in programs), 1, 2, whole.gathers)
    try:
        Machine(schedule, contributions(schedule), in_any_order).explore(30_000)
    except ScheduleError:
        assert order.races(schedule)


@pytest.mark.parametrize("num_ctas", SIZES)
def test_rounds_and_bytes_are_those_of_the_formulas(num_ctas: int) -> None:
    log2, size, epochs = num_ctas.bit_length() - 1, 3, 2
    expected = {
        "reduce_one_shot": (costs.gather_elements(size, num_ctas), min(log2, 1)),
        "gather_one_shot": (costs.gather_elements(size, num_ctas), min(log2, 1)),
        "reduce_log2": (costs.reduce_log2_elements(size, num_ctas), log2),
        "gather_log2": (costs.gather_elements(size, num_ctas), log2),
        "reduce_scatter": (2 * costs.gather_elements(size, num_ctas), 2 * min(log2, 1)),
        "reduce_exchange": (costs.reduce_log2_elements(size, num_ctas), log2),
    }
    for form, (elements, rounds) in expected.items():
        schedule = FORMS[form](num_ctas, size, epochs)
        assert (costs.sent_elements(schedule), costs.waits(schedule)) == (elements, rounds), form
        assert order.hops(FORMS[form](num_ctas, size, 1)) == rounds, form


def test_paper_s_formula_is_not_its_misprint() -> None:
    """2^(log2(N/2) + 1) - 1 is N - 1."""
    assert [costs.gather_elements(1, n) // n for n in SIZES] == [0, 1, 3, 7, 15]


@pytest.mark.parametrize("num_ctas", [2, 8, 16])
def test_the_public_loop_s_result_is_wrong_but_at_four_ctas(num_ctas: int) -> None:
    schedule = forms.reduce_public(num_ctas, 1)
    with pytest.raises(ScheduleError, match="epoch 0"):
        Machine(schedule, contributions(schedule), in_any_order).run(0)


def test_the_public_loop_at_four_ctas_adds_while_its_copy_may_be_reading() -> None:
    schedule = forms.reduce_public(4, 1)
    machine = Machine(schedule, contributions(schedule), in_any_order)
    outcomes = []
    for seed in range(40):
        try:
            machine.run(seed)
            outcomes.append("right")
        except ScheduleError:
            outcomes.append("wrong")
    assert set(outcomes) == {"right", "wrong"}
    assert any("copy" in race and "'partial'" in race for race in order.races(schedule))


def test_a_log2_form_of_three_ctas_is_refused() -> None:
    with pytest.raises(ValueError, match="power of two"):
        forms.reduce_log2(3, 1, 1)
