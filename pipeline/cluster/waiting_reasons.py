"""Tell why a job waits: which of Slurm's reasons a person must act on, and which only take time.

Slurm prints one word, such as QOSMaxGRESPerUser or BadConstraints. Both look alike, and only one of them ever ends by itself. The words
are those of squeue(1), section "JOB REASON CODES", and of Slurm's resource limits guide; a limit's name says what it counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Explanation:
    """What a reason means. needs_person: the job will not start before somebody acts."""

    needs_person: bool
    sentence: str


# The first pattern that matches counts. Names of limits are built from parts: (Assoc|QOS)(Max|Grp)(what)(PerUser|PerJob|Limit ...).
_TABLE = tuple(
    (re.compile(pattern, re.IGNORECASE), Explanation(needs_person, sentence))
    for pattern, needs_person, sentence in (
        (r"JobHeldUser", True, "somebody holds the job; `scontrol release JOB` lets it go"),
        (r"JobHeldAdmin", True, "an administrator holds the job; ask the site"),
        (r"JobHoldMaxRequeue|launch.failed.requeued.held", True,
         "Slurm holds the job because its start failed again and again; see the node's log, then `scontrol release JOB`"),
        (r"DependencyNeverSatisfied", True, "the job that it waits for can no longer end as it must; `cancel` and `rerun`"),
        (r"BadConstraints", True, "no node ever fits what it asks for; change cluster.constraint, the GPUs or the cores"),
        (r"InvalidAccount|InvalidQOS|QOSNotAllowed|AccountNotAllowed|AccountingPolicy|QOSUsageThreshold", True,
         "the account or the quality of service does not admit it; see cluster.account and cluster.qos"),
        (r"PartitionDown|PartitionInactive|FrontEndDown", True, "the partition takes no jobs now; ask the site, or set cluster.partition"),
        (r"PartitionNodeLimit|PartitionTimeLimit|PartitionConfig", True,
         "the partition never admits so many nodes or so long a time; see cluster.partition and cluster.time_limit_minutes"),
        (r"ReservationDeleted", True, "its reservation no longer exists; see cluster.reservation"),
        (r"ReqNodeNotAvail", False, "the nodes are reserved or out of service, for maintenance perhaps; `sinfo -R` says why"),
        (r"(Assoc|QOS).*(WallDurationPerJob|MaxWall)", True, "its time limit is longer than the account allows; lower cluster.time_limit_minutes"),
        (r"(Assoc|QOS).*Max.*(PerJob|PerNode|NodePerJob)", True, "one job may never use so much; ask for fewer GPUs, cores or nodes"),
        (r"(Assoc|QOS).*Min(?!utes)", True, "it asks for less than the quality of service demands; see cluster.qos"),
        (r"(Assoc|QOS).*(?<!Run)Minutes", True, "the account's budget of time is used up; ask the site for more, or set cluster.account"),
        (r"(Assoc|QOS)", False, "other jobs of the user, the account or the group use all that the limit allows; it starts when they end"),
        (r"JobArrayTaskLimit", False, "cluster.arms_at_once lets no more arms run at once"),
        (r"Dependency", False, "it waits for other jobs of the round"),
        (r"BeginTime", False, "Slurm waits some minutes after a requeue"),
        (r"Priority", False, "jobs of higher priority wait before it"),
        (r"Resources|NodeDown|Nodes_required.*|SchedDefer", False, "it waits for free nodes"),
        (r"Reservation", False, "its reservation has not begun"),
        (r"Licenses", False, "it waits for a licence"),
        (r"Cleaning|Prolog|BurstBuffer.*|PowerSaving|PowerNotAvail", False, "Slurm prepares or cleans up"),
    )
)  # fmt: skip


def explain(reason: str) -> Explanation | None:
    """What a reason for waiting means; None for a word that no table of ours knows, which is then shown as it is."""
    return next((told for pattern, told in _TABLE if pattern.match(reason.strip("( )"))), None)


def describe(reason: str) -> str:
    """The reason as `status` shows it: Slurm's word, whether somebody must act, and one sentence."""
    told = explain(reason) if reason else None
    if told is None:
        return reason
    return f"{reason}: {'needs a person, ' if told.needs_person else ''}{told.sentence}"
