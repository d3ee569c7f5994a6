"""Test the watchdog's rules both ways: what repeats, stalls or wanders is ended, and diligent sessions are not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from substrate.agent import watchdog
from substrate.agent.watchdog import CYCLES, FLIPS, REPEATS, STALLED_ANSWERS, WANDERING_STEPS, Event, Verdict, judge

FILE = "substrate/recipes/rft.py"


def event(tool: str, result: str = "done", *, carried_out: bool = True, **arguments: object) -> Event:
    return Event.of(tool, arguments, result, carried_out=carried_out)


def read(line: int, result: str = "text") -> Event:
    return event("read", result, path=FILE, first_line=line)


def patch(old: str, new: str) -> Event:
    return event("patch", "replaced", path=FILE, old=old, new=new)


def smoke(why: str, result: str = "loss") -> Event:
    return event("train", result, num_steps=3, why=why)


def end_of(steps: list[list[Event]]) -> tuple[int, Verdict] | None:
    """The number of the answer after which a session is ended, and the verdict."""
    verdicts = ((number, judge(steps[:number])) for number in range(1, len(steps) + 1))
    return next(((number, verdict) for number, verdict in verdicts if verdict and verdict.ends), None)


REPEATED = [[read(1)]] * 30
LOOPS = {
    "repeats": (REPEATED, REPEATS),
    "cycles": ([[read(1), smoke("a"), patch("a", "b")]] * 30, CYCLES),
    "stalls": ([[read(1)], *[[]] * 30], 1 + STALLED_ANSWERS),
    "wanders": ([[read(line)] for line in range(1, 60)], WANDERING_STEPS),
    "flips": ([[patch(*("ab" if number % 2 else "ba")), smoke(f"{number}?")] for number in range(60)], FLIPS),
}


@pytest.mark.parametrize("name", LOOPS)
def test_each_rule_ends_its_loop_at_its_number(name):
    steps, number = LOOPS[name]
    ended, verdict = end_of(steps)
    assert (ended, verdict.outcome) == (number, f"watchdog_{name}")
    assert str(number - (name == "stalls")) in verdict.what


@pytest.mark.parametrize("name", ["repeats", "cycles", "wanders", "flips"])
def test_the_model_is_warned_before_the_end(name):
    steps, number = LOOPS[name]
    verdict = judge(steps[: number - 1])
    assert verdict and not verdict.ends and verdict.outcome == f"watchdog_{name}"


@pytest.mark.parametrize("length", range(2, watchdog.LONGEST_CYCLE + 1))
def test_cycles_of_every_length_are_found_also_within_an_answer(length):
    period = [smoke("a"), *[read(line) for line in range(1, length)]]
    assert end_of([[one] for one in period * 9])[0] == length * CYCLES
    assert end_of([period * CYCLES])[1].outcome == "watchdog_cycles"


def test_a_longer_cycle_ends_by_another_rule():
    period = [[read(line)] for line in range(1, watchdog.LONGEST_CYCLE + 2)]
    assert end_of(period * 9)[1].outcome == "watchdog_wanders"


def test_results_that_differ_in_numbers_alone_are_equal():
    assert end_of([[smoke("again", f"3 steps, {seconds / 7:.2f} s")] for seconds in range(1, 30)])[0] == REPEATS
    assert end_of([[smoke("again", text)] for text in "abcdefghijk"]) is None


def test_a_look_between_repeats_changes_nothing_and_an_act_does():
    looked = [[read(1), read(line)] for line in range(2, 30)]
    assert end_of(looked)[0] == REPEATS
    acted = [[patch(str(line), "x"), read(1)] for line in range(2, 30)]
    assert end_of(acted) is None


def test_refused_edits_are_no_acts():
    refused = [
        [event("patch", f"no match {'x' * n}", carried_out=False, path=FILE, old="a", new="b" * n)] for n in range(30)
    ]
    assert end_of(refused)[1].outcome == "watchdog_wanders"
    same = [[event("write", "closed_path", carried_out=False, path="substrate/answers.py", content="x")]] * 30
    assert end_of(same)[1].outcome == "watchdog_repeats"


def test_flips_of_whole_contents_are_found_and_other_files_do_not_matter():
    def write(content: str, path: str = FILE) -> Event:
        return event("write", "written", path=path, content=content)

    steps = [
        [write("a" if n % 2 else "b"), write(f"{n}", "substrate/recipes/grpo.py"), smoke(f"{n}")] for n in range(30)
    ]
    assert end_of(steps)[1].outcome == "watchdog_flips"
    # Three contents in turn are a search, and going back to the better one is its end.
    assert end_of([[write("abc"[n % 3]), smoke(f"{n}")] for n in range(5)] + [[write("a"), smoke("all")]]) is None


# ---- diligent sessions ----

LOOK = [[read(line), event("read", "text", path=f"substrate/data/{line}.py")] for line in range(1, 15)]
HEALTHY = {
    "looks long, edits once, trains": [*LOOK, [patch("a", "b")], [smoke("does it run?")], [event("train", num_steps=None, why="all")]],
    "repairs the same crash four times": [
        step
        for attempt in range(4)
        for step in (
            [patch(f"a{attempt}", f"a{attempt + 1}")],
            [smoke("again", "crashed: KeyError")],
            [event("run", "Traceback", command="tail -5 log")],
            [read(1, f"version {'i' * attempt}")],
        )
    ],
    "compares two contents and goes back": [
        [patch("a", "b")], [smoke("b", "loss 2")], [patch("b", "a")], [smoke("a", "loss 3")], [patch("a", "b")], [smoke("b", "loss 2")],
        [event("train", num_steps=None, why="all")],
    ],
    "sweeps a constant": [[patch(f"rate = {n}", f"rate = {n + 1}"), smoke("sweep", "loss")] for n in range(30)],
    "reads a file again after each edit": [[patch(f"{n}", f"{n + 1}"), read(1)] for n in range(30)],
    "thinks aloud between acts": [step for n in range(10) for step in ([], [], [patch(f"{n}", f"{n + 1}")], [smoke("x")])],
    "runs one test command after edits by commands": [
        [event("run", "", command=f"sed -i s/{n}/{n + 1}/ f.py"), event("run", "1 failed", command="python -m pytest")] for n in range(30)
    ],
    "tries a wrong patch thrice, then reads": [
        *[[event("patch", "no_match", carried_out=False, path=FILE, old="x", new="y")]] * 3, [read(1)], [patch("x ", "y")], [smoke("z")],
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_a_diligent_session_is_not_ended(name):
    assert end_of(HEALTHY[name]) is None


@given(st.lists(st.integers(0, WANDERING_STEPS - 1), max_size=8))
def test_new_calls_with_an_act_now_and_then_are_never_ended(looks):
    """Property: a session in which every call is new, and an act comes before the limit, goes on."""
    steps = []
    for place, number in enumerate(looks):
        steps += [[read(1_000 * place + line)] for line in range(number)]
        steps += [[patch(f"{place}", f"{place + 1}")]]
    assert end_of(steps) is None


@given(
    st.lists(
        st.lists(st.sampled_from([read(1), read(2), smoke("a"), patch("a", "b"), patch("b", "a")]), max_size=4),
        max_size=300,
    )
)
def test_a_session_of_few_different_calls_is_ended_and_the_verdict_is_the_same_twice(steps):
    ended = end_of(steps)
    assert ended == end_of(steps)
    if len({one for step in steps for one in step}) <= 1 and len(steps) >= max(WANDERING_STEPS, 3 * REPEATS):
        assert ended
