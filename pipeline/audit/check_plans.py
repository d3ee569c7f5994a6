"""Plans derived again: arms from policy, seed and round; policy from the decision before; proposals through the gate; cost within article 4."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from math import prod
from typing import Any

from pipeline.audit.findings import Report
from pipeline.campaign import canonical, constitution
from pipeline.campaign.errors import PipelineError
from pipeline.campaign.records import Plan
from pipeline.decision import derive, plan, proposals
from pipeline.decision.proposal_gate import ProposalVerdict

Record = Mapping[str, Any]
Read = Callable[[str], bytes | None]
"""Path below the campaign -> content; None where it is not there."""
COST = {
    "tokens_per_arm": ("recipe.num_steps", "recipe.batch_size", "recipe.sequence_length"),
    "gpus_per_arm": ("parallelism.tp", "parallelism.pp", "parallelism.cp", "parallelism.dp"),
}
"""What a round costs, as a product of what its configuration says."""
STUMBLES = (PipelineError, AttributeError, KeyError, IndexError, TypeError, ValueError, ArithmeticError)
"""What code that expects honest records may raise on others: that is then the finding."""


def check_plans(records: Sequence[Record], read: Read, report: Report) -> None:
    """Every plan and proposal of a log whose records have their form."""
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
            check_arms(records[:position], frozen, basis, first, rules, report, record["seq"])
            check_config(record["round"], frozen, basis, read, report)
        except STUMBLES as error:
            report.record(record["seq"], f"the plan cannot be derived again ({error})")
    report.checked(
        "plans: arms from policy, seed and round; policy from the decision before; articles 2, 4, 5 and 8", since
    )
    check_proposals(records, rules, read, report)


def newest_basis(records: Sequence[Record], round_name: str) -> Record:
    """What the log has of a round's configuration before its plan."""
    return [one for one in records if (one["event"], one.get("round")) == ("basis", round_name)][-1]


def check_digests(record: Record, frozen: Plan, basis: Record, facts: Mapping[str, Any], report: Report) -> None:
    """The plan names the image, constitution, code and configuration that the campaign froze, and itself by its digest."""
    if canonical.sha256(canonical.encoded(record["plan"])) != record["plan_digest"]:
        report.record(record["seq"], "the plan has another digest than the record says")
    expected = {
        "campaign": facts["campaign"], "round": record["round"], "image_digest": facts["image"]["tree_digest"],
        "constitution_digest": facts["constitution_digest"], "code_digest": facts["code_digest"], "config_digest": basis["config_digest"],
    }  # fmt: skip
    wrong = [name for name, value in expected.items() if getattr(frozen, name) != value]
    if wrong:
        report.record(record["seq"], f"the plan has another {', '.join(wrong)} than the campaign froze")
    if basis["external"] != facts.get("external", basis["external"]):  # caps are by kind of target
        report.record(basis["seq"], "the round has another external target than the campaign froze")
    if sorted(basis["tasks"]["families"]) != sorted(facts["families"]):
        report.record(basis["seq"], "the round has other families than the campaign froze")


def check_arms(
    before: Sequence[Record], frozen: Plan, basis: Record, first: tuple[Record, Plan], rules: constitution.Constitution,
    report: Report, seq: int,
) -> None:  # fmt: skip
    """The eight arms follow, their settings are open, the round is within the budget, and nothing but the policy passed on."""
    number = int(frozen.round[1:])
    if number == 0:
        expected = plan.reference_arms(basis["seed"])
    else:
        replicates = rules.first_round_replicates if number == 1 else 0
        expected = plan.make_arms(frozen.policy, number, basis["seed"], replicates, basis["reference"])
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
        report.record(seq, "seed, items, proposals or reference recipe are not those that the campaign began with")
    if frozen.policy.axes != first[1].policy.axes:
        report.record(seq, "the axes are not those that the campaign began with")
    if number:
        check_spending(before, basis, len(frozen.arms), number, rules, report, seq)


def check_spending(
    before: Sequence[Record], basis: Record, num_arms: int, number: int, rules: constitution.Constitution, report: Report, seq: int
) -> None:  # fmt: skip
    """Article 4, with hours that are no fewer than the log's attempts took."""
    newest = {
        (r["round"], r["arm"], r["attempt"]): r for r in before if r["event"] == "attempt" and r["arm"] != "reference"
    }
    logged = sum(record["gpu_seconds"] for record in newest.values()) if basis["gpus_per_arm"] else 0
    if basis["spent_gpu_seconds"] < logged:
        report.record(
            seq, f"{basis['spent_gpu_seconds']} GPU-seconds were counted as spent, the attempts before took {logged}"
        )
    rules.check_round(number)
    hours = Fraction(basis["gpus_per_arm"] * basis["time_limit_minutes"], 60)
    rules.check_spending(basis["tokens_per_arm"], hours, num_arms, Fraction(basis["spent_gpu_seconds"], 3600))


def check_config(round_name: str, frozen: Plan, basis: Record, read: Read, report: Report) -> None:
    """What the log says of the configuration is what the frozen file says, as far as it stands there in plain lines."""
    path = f"rounds/{round_name}/config.yaml"
    content = read(path)
    if content is None or canonical.sha256(content) != frozen.config_digest:
        return  # told where all files are compared
    found = canonical.scalars(content.decode("utf-8", "replace"))
    wanted = {**basis["reference"], "seed": str(basis["seed"]), "tasks.level": basis["tasks"]["level"]}
    wanted |= {f"tasks.{name}": str(basis["tasks"][name]) for name in ("num_dev_per_family", "num_fresh_per_family")}
    wanted |= {"policy.proposals.mode": basis["proposals"]["mode"], "policy.proposals.kind": basis["proposals"]["kind"]}
    wanted |= {"external.kind": basis["external"], "cluster.time_limit_minutes": str(basis["time_limit_minutes"])}
    wanted |= {name: str(basis[name]) for name in COST}
    found |= cost_of(found)
    wrong = [key for key, value in wanted.items() if key in found and not plan.same_value(found[key], value)]
    if wrong:
        report.file(path, f"says something else than the log of {', '.join(sorted(wrong))}")
    unread = sorted(set(wanted) - set(found))
    if unread:
        report.unknown(f"{path} has no plain line for {', '.join(unread)}: the log is believed")


def cost_of(found: Mapping[str, str]) -> dict[str, str]:
    """What article 4 is about, which stands in no line: products of what does, as far as it does."""
    told = {}
    for name, factors in COST.items():
        numbers = [found[factor] for factor in factors if re.fullmatch("[0-9]{1,9}", found.get(factor, ""))]
        if len(numbers) == len(factors):
            told[name] = str(prod(map(int, numbers)))
    if found.get("cluster.gpus_per_node") == "0":  # nobody's hours
        told["gpus_per_arm"] = "0"
    return told


def verdicts_of(records: Sequence[Record], round_name: str) -> tuple[ProposalVerdict, ...]:
    """Of a round's newest proposal; the plan that follows was made with it."""
    made = [one for one in records if (one["event"], one.get("round")) == ("proposal", round_name)]
    accepted = [each for each in (made[-1]["verdicts"] if made else []) if each["accepted"]]
    return tuple(ProposalVerdict(each["slot"], True, each["axis"], (each["key"], each["value"])) for each in accepted)


def check_proposals(records: Sequence[Record], rules: constitution.Constitution, read: Read, report: Report) -> None:
    """Stored bytes judged again by the gate, to the same verdicts; each refusal has its record. The policy is that of the round's plan."""
    asked = [record for record in records if record["event"] == "proposal"]
    since = len(report.findings)
    plans = {record["round"]: record["plan"] for record in records if record["event"] == "plan"}
    modes = {record["round"]: record["proposals"] for record in records if record["event"] == "basis"}
    for record in asked:
        kept = {}
        asked_for = {"kind": record["policy"], "mode": record["mode"]}
        if asked_for != modes.get(record["round"], asked_for):  # of a round that is not planned yet nothing is known
            report.record(record["seq"], "the proposal is of another kind or mode than its round was configured with")
        for name in ("request", "response"):
            path, wanted = (
                f"rounds/{record['round']}/proposals/{record['number']:02d}.{name}.json",
                record[f"{name}_digest"],
            )
            kept[name] = read(path) or b""
            if wanted and canonical.sha256(kept[name]) != wanted:
                report.file(path, f"is not what record {record['seq']} has")
        if len(report.findings) > since:
            continue
        try:
            policy = Plan.from_json(plans[record["round"]]).policy if record["round"] in plans else None
            if policy is None:
                report.unknown(f"the proposals of {record['round']}, which is not planned yet")
                continue
            proposals.rejudged(record, kept["request"], kept["response"], policy, rules)
            check_refusals(records, record, report)
        except STUMBLES as error:
            report.record(record["seq"], f"the proposal replayed has other verdicts ({error})")
    if asked:
        report.checked(f"{len(asked)} recorded proposals, replayed through the gate", since)


def check_refusals(records: Sequence[Record], proposal: Record, report: Report) -> None:
    """One `refusal` for each verdict that refused, and no other."""
    about = (proposal["round"], proposal["number"])
    told = [r for r in records if r["event"] == "refusal" and (r["round"], r["number"]) == about]
    names = ("slot", "article", "code", "what")
    refused = [{name: each[name] for name in names} for each in proposal["verdicts"] if not each["accepted"]]
    for record in told:
        if {name: record[name] for name in names} not in refused:
            report.record(record["seq"], f"is no verdict of proposal {about[1]} of {about[0]}")
    if len(told) < len(refused):
        report.record(proposal["seq"], f"{len(refused)} proposals were refused, {len(told)} refusals are logged")
