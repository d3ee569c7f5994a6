"""Derive every plan again: its arms from policy, seed and round, its policy from the decision before; replay proposals; check the cost."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from math import prod
from typing import Any

from pipeline.audit.findings import ERRORS_ON_BAD_RECORDS, Report
from pipeline.campaign import canonical, constitution
from pipeline.campaign.records import Plan
from pipeline.decision import derive, plan, proposals
from pipeline.decision.proposal_gate import ProposalVerdict

Record = Mapping[str, Any]
Read = Callable[[str], bytes | None]
"""Path below the campaign -> the file's bytes; None if there is no such file."""
COST = {
    "tokens_per_arm": ("recipe.num_steps", "recipe.batch_size", "recipe.sequence_length"),
    "gpus_per_arm": ("parallelism.tp", "parallelism.pp", "parallelism.cp", "parallelism.dp"),
}
"""What a round costs -> the keys of its configuration whose product that is."""


def check_plans(records: Sequence[Record], read: Read, report: Report) -> None:
    """Check every plan and proposal of a log whose records have the right form."""
    since, facts = len(report.findings), records[0]["facts"]
    rules = constitution.Constitution(facts["constitution_digest"], facts["articles"])
    first: tuple[Record, Plan] | None = None
    for position, record in enumerate(records):
        if record["event"] != "plan":
            continue
        try:
            basis = newest_basis(records[:position], record["round"])
            frozen = Plan.from_json(record["plan"])
            first = first or (basis, frozen)
            check_digests(record, frozen, basis, facts, report)
            check_arms(records[:position], frozen, basis, first, facts, report, record["seq"])
            check_config(record["round"], frozen, basis, facts, read, report)
        except ERRORS_ON_BAD_RECORDS as error:
            report.record(record["seq"], f"the plan cannot be derived again ({error})")
    report.checked(
        "plans: arms from policy, seed and round; policy from the decision before; articles 2, 4, 5 and 8", since
    )
    check_proposals(records, rules, read, report)


def newest_basis(records: Sequence[Record], round_name: str) -> Record:
    """The newest `basis` record of a round. Raises IndexError if there is none."""
    return [record for record in records if (record["event"], record.get("round")) == ("basis", round_name)][-1]


def check_digests(record: Record, frozen: Plan, basis: Record, facts: Mapping[str, Any], report: Report) -> None:
    """Check that a plan names the image, constitution, code and configuration that the campaign froze, and has the logged digest."""
    if canonical.sha256(canonical.encoded(record["plan"])) != record["plan_digest"]:
        report.record(record["seq"], "the plan does not have the digest that its record says")
    expected = {
        "campaign": facts["campaign"], "round": record["round"], "image_digest": facts["image"]["tree_digest"],
        "constitution_digest": facts["constitution_digest"], "code_digest": facts["code_digest"], "config_digest": basis["config_digest"],
    }  # fmt: skip
    wrong = [name for name, value in expected.items() if getattr(frozen, name) != value]
    if wrong:
        report.record(record["seq"], f"the plan has another {', '.join(wrong)} than the campaign froze")
    if basis["external"] != facts.get("external", basis["external"]):  # the caps depend on the target's kind
        report.record(basis["seq"], "the round has another external target than the campaign froze")
    items = {name: basis["tasks"][f"num_{name}_per_family"] for name in ("dev", "fresh")}
    if any(facts["design"][f"{name}_items"] != number for name, number in items.items()):
        report.record(
            basis["seq"], "the round has other numbers of items than the design that the critical values are for"
        )
    if sorted(basis["tasks"]["families"]) != sorted(facts["families"]):
        report.record(basis["seq"], "the round has other families than the campaign froze")


def check_arms(
    before: Sequence[Record], frozen: Plan, basis: Record, first: tuple[Record, Plan], facts: Mapping[str, Any],
    report: Report, seq: int,
) -> None:  # fmt: skip
    """Check that the arms follow from the plan, that the constitution allows their settings and the cost, and that only the policy changed.

    before: the records before the plan. first: basis and plan of the campaign's first plan. seq: number of the plan's record.
    """
    rules = constitution.Constitution(facts["constitution_digest"], facts["articles"])
    number, num_rounds = int(frozen.round[1:]), facts["design"]["rounds"]
    if number == 0:
        expected = plan.reference_arms(basis["seed"])
    else:
        replicates = rules.first_round_replicates if number == 1 else 0
        expected = plan.make_arms(
            frozen.policy,
            number,
            basis["seed"],
            replicates,
            basis["reference"],
            facts["confirmation"],
            number >= num_rounds,
        )
        expected = proposals.merge(
            expected, verdicts_of(before, frozen.round), basis["proposals"]["mode"], frozen.policy.standing
        )
    if frozen.arms != expected:
        wrong = [arm.name for arm, other in zip(frozen.arms, expected, strict=False) if arm != other] or [
            "their number"
        ]
        report.record(seq, f"the arms do not follow from policy, seed and round: {', '.join(wrong)}")
    for arm in frozen.arms:
        rules.check_settings(arm.overrides)
    derive.check_policy(before, frozen.round, frozen.policy)
    common = set(basis["reference"]) & set(first[0]["reference"])
    same = all(basis["reference"][key] == first[0]["reference"][key] for key in common)
    if not same or (basis["seed"], basis["tasks"], basis["proposals"]) != tuple(
        first[0][n] for n in ("seed", "tasks", "proposals")
    ):
        report.record(seq, "the seed, items, proposals or reference recipe are not those that the campaign began with")
    if frozen.policy.axes != first[1].policy.axes:
        report.record(seq, "the axes are not those that the campaign began with")
    if number:
        rules.check_round(number, num_rounds)
        check_spending(before, basis, len(frozen.arms), rules, report, seq)


def check_spending(
    before: Sequence[Record], basis: Record, num_arms: int, rules: constitution.Constitution, report: Report, seq: int
) -> None:  # fmt: skip
    """Check the cost against article 4. The plan must count at least the GPU-seconds that the logged attempts took."""
    newest = {
        (r["round"], r["arm"], r["attempt"]): r for r in before if r["event"] == "attempt" and r["arm"] != "reference"
    }
    logged = sum(record["gpu_seconds"] for record in newest.values()) if basis["gpus_per_arm"] else 0
    if basis["spent_gpu_seconds"] < logged:
        report.record(
            seq,
            f"{basis['spent_gpu_seconds']} GPU-seconds were counted as spent, but the attempts before took {logged}",
        )
    hours = Fraction(basis["gpus_per_arm"] * basis["time_limit_minutes"], 60)
    rules.check_spending(basis["tokens_per_arm"], hours, num_arms, Fraction(basis["spent_gpu_seconds"], 3600))


def check_config(
    round_name: str, frozen: Plan, basis: Record, facts: Mapping[str, Any], read: Read, report: Report
) -> None:
    """Check that the frozen configuration says what the log says of it, as far as each value stands on a line of its own."""
    path = f"rounds/{round_name}/config.yaml"
    content = read(path)
    if content is None or canonical.sha256(content) != frozen.config_digest:
        return  # check_files reports it
    values = canonical.scalars(content.decode("utf-8", "replace"))
    wanted = {**basis["reference"], "seed": str(basis["seed"]), "tasks.level": basis["tasks"]["level"]}
    wanted |= {f"tasks.{name}": str(basis["tasks"][name]) for name in ("num_dev_per_family", "num_fresh_per_family")}
    wanted |= {
        f"tasks.dev_slices.{family}.{feature}.{end}": text
        for family, limits in basis["tasks"]["dev_slices"].items()
        for feature, ends in limits.items()
        for end, text in ends.items()
    }
    wanted |= {"policy.proposals.mode": basis["proposals"]["mode"], "policy.proposals.kind": basis["proposals"]["kind"]}
    wanted |= {
        "policy.choice": facts["choice"],
        "policy.confirmation": facts["confirmation"],
        "policy.rounds": str(facts["design"]["rounds"]),
    }
    if values.get("policy.rounds") == "0":
        values["policy.rounds"] = str(facts["articles"]["4"]["rounds"])
    wanted |= {"external.kind": basis["external"], "cluster.time_limit_minutes": str(basis["time_limit_minutes"])}
    wanted |= {name: str(basis[name]) for name in COST}
    values |= cost_of(values)
    wrong = [key for key, value in wanted.items() if key in values and not plan.same_value(values[key], value)]
    if wrong:
        report.file(path, f"says something else than the log about {', '.join(sorted(wrong))}")
    if is_other_slice(values, wanted):
        report.file(path, "has other slices of dev (tasks.dev_slices) than the log")
    unread = sorted(set(wanted) - set(values))
    if unread:
        report.unknown(f"{path} has no line of its own for {', '.join(unread)}, so these are taken from the log")


def is_other_slice(values: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether a configuration names a slice that the log does not, or lacks one of the log. values, wanted: key -> text."""
    ours, logged = ({key for key in each if key.startswith("tasks.dev_slices.")} for each in (values, wanted))
    return ours != logged


def cost_of(values: Mapping[str, str]) -> dict[str, str]:
    """What article 4 limits: products of configured values, for those whose factors are all known. values: key -> text."""
    costs = {}
    for name, factors in COST.items():
        numbers = [values[factor] for factor in factors if re.fullmatch("[0-9]{1,9}", values.get(factor, ""))]
        if len(numbers) == len(factors):
            costs[name] = str(prod(map(int, numbers)))
    if values.get("cluster.gpus_per_node") == "0":  # a round without GPUs spends no GPU-hours
        costs["gpus_per_arm"] = "0"
    return costs


def verdicts_of(records: Sequence[Record], round_name: str) -> tuple[ProposalVerdict, ...]:
    """The accepted verdicts of a round's newest proposal, with which its plan was made."""
    logged = [record for record in records if (record["event"], record.get("round")) == ("proposal", round_name)]
    accepted = [verdict for verdict in (logged[-1]["verdicts"] if logged else []) if verdict["accepted"]]
    return tuple(ProposalVerdict(v["slot"], True, v["axis"], (v["key"], v["value"])) for v in accepted)


def check_proposals(records: Sequence[Record], rules: constitution.Constitution, read: Read, report: Report) -> None:
    """Replay the stored proposals through the gate, under the policy of the round's plan; they must give the logged verdicts and refusals."""
    logged = [record for record in records if record["event"] == "proposal"]
    since = len(report.findings)
    plans = {record["round"]: record["plan"] for record in records if record["event"] == "plan"}
    modes = {record["round"]: record["proposals"] for record in records if record["event"] == "basis"}
    for record in logged:
        stored = {}
        mode = {"kind": record["policy"], "mode": record["mode"]}
        if mode != modes.get(record["round"], mode):  # a round that is not planned yet has no basis to compare with
            report.record(record["seq"], "the proposal is of another kind or mode than its round was configured with")
        for name in ("request", "response"):
            path = f"rounds/{record['round']}/proposals/{record['number']:02d}.{name}.json"
            digest = record[f"{name}_digest"]
            stored[name] = read(path) or b""
            if digest and canonical.sha256(stored[name]) != digest:
                report.file(path, f"does not have the digest that record {record['seq']} names")
        if len(report.findings) > since:
            continue
        try:
            policy = Plan.from_json(plans[record["round"]]).policy if record["round"] in plans else None
            if policy is None:
                report.unknown(f"the proposals of {record['round']} were not replayed, because it is not planned yet")
                continue
            proposals.rejudged(record, stored["request"], stored["response"], policy, rules)
            check_refusals(records, record, report)
        except ERRORS_ON_BAD_RECORDS as error:
            report.record(record["seq"], f"the proposal replayed has other verdicts ({error})")
    if logged:
        report.checked(f"{len(logged)} recorded proposals, replayed through the gate", since)


def check_refusals(records: Sequence[Record], proposal: Record, report: Report) -> None:
    """Check that each verdict that refused has one `refusal` record, and that there are no others."""
    about = (proposal["round"], proposal["number"])
    logged = [r for r in records if r["event"] == "refusal" and (r["round"], r["number"]) == about]
    names = ("slot", "article", "code", "what")
    refused = [{name: verdict[name] for name in names} for verdict in proposal["verdicts"] if not verdict["accepted"]]
    for record in logged:
        if {name: record[name] for name in names} not in refused:
            report.record(record["seq"], f"is not a verdict of proposal {about[1]} of {about[0]}")
    if len(logged) < len(refused):
        report.record(proposal["seq"], f"{len(refused)} proposals were refused, but {len(logged)} refusals are logged")
