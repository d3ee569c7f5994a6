"""The tables of a decision's page: LoRA targets, arms, families and submissions. A table is a list of rows of text; its first row is the header."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from pipeline.campaign.records import Arm, Outcome
from pipeline.config import model_size
from pipeline.config.settings import Settings
from pipeline.decision.board_submissions import Submission
from pipeline.decision.evidence import Evidence
from pipeline.decision.history import History
from pipeline.reporting.document import Table
from pipeline.stats.canaries import LEAST_REPEATS
from pipeline.stats.lifts import accuracy, interval, signed

VALUE = (
    "A value is no mean of the two lifts beside it: an arm's gains on dev and fresh are taken on the probit scale, pulled toward the mean gain "
    "of the round's arms on dev, and turned into points at the reference's level on the campaign's fresh items so far, or on the board. So it "
    "can exceed both lifts, and the value of an older arm moves as later rounds bring items and scores."
)
"""What the column `value` is (stats/arm_values.py), for whoever compares it with the lifts."""
WORDS = 60  # the number of letters of a client's message that a page shows


def of_targets(chosen: Settings) -> Table:
    """One row for each LoRA target: the kind of layer that has it, in how many layers, and how many modules it matches."""
    matched = model_size.matched_modules(chosen.to_dict()["model"], chosen.recipe.lora.targets)
    rows = [[target, found.kind, str(found.layers), str(found.modules)] for target, found in matched.items()]
    return [["LoRA target", "kind of layer", "layers", "modules"], *rows]


def of_arms(evidence: Evidence, arms: Mapping[str, Arm]) -> Table:
    """One row for the reference and each arm. Accuracies are in percent, the fresh lift over the reference and the value in points."""
    board, values = evidence.board.get(evidence.round, {}), evidence.look.values if evidence.look else {}
    rows = [["arm", "role", "setting", "dev %", "fresh %", "fresh lift, points (95 %)", "board", "value, points"]]
    for run in evidence.outcomes:
        arm = arms.get(run.arm)
        lift = evidence.lift(run.arm, "reference", "fresh")
        moved = ", ".join(f"{key}={value}" for key, value in arm.overrides[-1:]) if arm and not arm.replicate_of else ""
        rows.append([
            run.arm, run.role, moved or (arm.replicate_of or "" if arm else ""), _percent(run, "dev"), _percent(run, "fresh"),
            _with_interval(lift.mean, lift.variance + 2 * evidence.seed_variance) if lift else run.exit_class if run.status != "completed" else "",
            board.get(run.arm, ""), signed(Fraction(values[run.arm])) if run.arm in values else "",
        ])  # fmt: skip
    return rows


def of_families(evidence: Evidence) -> Table:
    """One row for each family: its state, its gap, the gap's upper bound and the detectable gap, in points. Empty without a look."""
    if evidence.look is None:
        return []
    lifts, bounds, power = gaps(evidence), evidence.look.verdict.upper_bounds, evidence.look.power.gap_now
    quiet = (
        "-"
        if evidence.look.num_repeats >= LEAST_REPEATS
        else f"not evaluated ({evidence.look.num_repeats} of {LEAST_REPEATS} repeats)"
    )
    rows = [["family", "state", "cause", "gap, points", "at most (95 %)", "detectable (80 %)", "canaries"]]
    for family, state in sorted(evidence.families.items()):
        dev, fresh = lifts[family]
        rows.append([
            family, state.name, state.code, f"{100 * (dev - fresh):+.1f}", f"{100 * float(bounds[family]):+.1f}",
            f"{100 * float(power[family]):.1f}", ", ".join(evidence.look.canaries[family]) or quiet,
        ])  # fmt: skip
    return rows


def of_submissions(sent: Sequence[Submission], history: History, round_name: str) -> Table:
    """One row for each submission of this round; at the last decided round the finalists' follow."""
    is_last = history.decided == round_name
    rows = [["number", "arm", "purpose", "day", "state", "score"]]
    for entry in sent:
        if is_last if entry.purpose == "finalist" else entry.round == round_name:
            arm = entry.arm if entry.round == round_name else f"{entry.arm} of {entry.round}"
            rows.append(
                [str(entry.number), arm, entry.purpose, entry.day, entry.state, entry.printed or _short(entry.why)]
            )
    return rows


def gaps(evidence: Evidence) -> dict[str, tuple[float, float]]:
    """For each family, the arms' mean lift over the reference on dev and on fresh, as differences of accuracies."""
    reference, *runs = evidence.outcomes
    runs = [run for run in runs if run.scored("dev") and run.scored("fresh")]
    if not runs or not (reference.scored("dev") and reference.scored("fresh")):
        return {}

    def mean(item_set: str, family: str) -> float:
        base = reference.outcomes[item_set][family]
        lifts = [run.outcomes[item_set][family].count("1") - base.count("1") for run in runs]
        return sum(lifts) / len(lifts) / len(base)

    return {family: (mean("dev", family), mean("fresh", family)) for family in sorted(reference.outcomes["dev"])}


def _with_interval(mean: Fraction, variance: Fraction) -> str:
    """A lift in points with its 95 % interval, such as `+8.07 (+6.40 to +9.74)`."""
    low, high = interval(mean, variance)
    return f"{signed(mean)} ({signed(low)} to {signed(high)})"


def _percent(run: Outcome, item_set: str) -> str:
    value = accuracy(run, item_set)
    return "" if value is None else f"{100 * float(value):.1f}"


def _short(why: str) -> str:
    """The beginning of a client's message; `board status` shows all of it."""
    return why if len(why) <= WORDS else f"{why[:WORDS].rstrip()} ..."
