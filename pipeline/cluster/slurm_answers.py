"""Read what sbatch, squeue, scontrol and sacct print: ids of jobs, words for states and reasons, one line for each job. Nothing here asks Slurm.

Slurm writes an array that waits as one job (`41_[0-7%4]`), cuts long words and long lists, and prints an id in several forms. Everything
that is not surely read is "not known yet" (the state UNKNOWN or a word of no set below), never an end. Sources: squeue(1), scontrol(1) and
sacct(1), sections on job states and formats; captured answers lie in tests/cluster/answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

UNKNOWN = "UNKNOWN"
WAITS = frozenset(
    ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT", "SUSPENDED", "EXPEDITING")
)
RUNS = frozenset(
    ("RUNNING", "COMPLETING", "CONFIGURING", "POWER_UP_NODE", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED")
)
COMES_BACK = frozenset(
    ("PREEMPTED", "NODE_FAIL")
)  # Slurm requeues such a job, unless it was submitted with --no-requeue
ENDS = COMES_BACK | frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "OUT_OF_MEMORY", "RECONFIG_FAIL",
     "TIMEOUT")
)  # fmt: skip
_WORDS = WAITS | RUNS | ENDS

_ID = re.compile(
    r"(?P<root>\d+)(?:\+(?P<component>\d+))?(?:_(?:(?P<task>\d+)|\[(?P<tasks>[^\]]*)\](?P<throttle>%\d+)?))?"
    r"(?:\.(?P<step>\w+)(?:\+\d+)?)?(?:;[\w.-]+)?"
)
_SENTENCE = re.compile(r"Submitted batch job (\d+)(?: on cluster \S+)?")
_BARE = re.compile(r"(\d+)(?:;[\w.-]+)?")
_TASKS = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")
_NO_JOB = re.compile(r"^(No jobs in the system|CLUSTER: .*|JOBID\|STATE\|.*|JobID\|State\|.*|-+(\|-+)*)$")


@dataclass(frozen=True)
class Explanation:
    """What a reason means. needs_person: the job will not start before somebody acts."""

    needs_person: bool
    sentence: str


# The first pattern that matches counts. Names of limits are built from parts: (Assoc|QOS)(Max|Grp)(what)(PerUser|PerJob|Limit ...).
_REASONS = tuple(
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


@dataclass(frozen=True)
class JobIds:
    """The jobs that one printed id stands for: a job, a task of an array, or those tasks of an array that wait.

    root: the id of the job or array. tasks: None for a job without tasks. cut: Slurm did not print all tasks (`1,3,5,...`). step: such as
    "batch" or "0"; empty for the job itself.
    """

    root: str
    tasks: tuple[range, ...] | None = None
    cut: bool = False
    step: str = ""

    def covers(self, job_id: str) -> bool:
        """Whether the job or task `job_id` ("41" or "41_3") is one of these."""
        root, _, task = job_id.partition("_")
        if root != self.root or (self.tasks is None) != (not task):
            return False
        return self.tasks is None or any(int(task) in each for each in self.tasks)

    def each(self) -> Iterator[str]:
        """The ids of these jobs, one by one."""
        if self.tasks is None:
            yield self.root
        else:
            yield from (f"{self.root}_{number}" for part in self.tasks for number in part)


@dataclass(frozen=True)
class Line:
    """What one source says of some jobs. start: ISO time or empty. ended_at: ISO time or empty, sacct alone."""

    ids: JobIds
    state: str
    node: str = ""
    reason: str = ""
    start: str = ""
    ended_at: str = ""


@dataclass(frozen=True)
class Answer:
    """What one source printed. unread: lines that nobody can read, such as an error among the rows. spoke: it printed anything at all.

    A source that says "there is none" prints at least a header; one that prints nothing is silent.
    """

    lines: list[Line] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    spoke: bool = False


def parse_ids(text: str) -> JobIds | None:
    """The jobs that an id stands for; None where the text is no id.

    `41`  `41_3`  `41_[0-7%4]`  `41_[1,3-5]`  `41_[0-9:2]`  `41_[1,3,...]`  `41_3.batch`  `41_3.0`  `41_3;alpha`  `41+0`
    """
    found = _ID.fullmatch(text.strip())
    if not found:
        return None
    # The first component of a heterogeneous job has the job's own id. The others are jobs of another kind.
    component = found["component"]
    root = found["root"] if not component or int(component) == 0 else f"{found['root']}+{component}"
    if found["task"] is not None:
        number = int(found["task"])
        return JobIds(root, (range(number, number + 1),), step=found["step"] or "")
    if found["tasks"] is not None:
        tasks, cut = parse_tasks(found["tasks"])
        return JobIds(root, tasks, cut, found["step"] or "")
    return JobIds(root, step=found["step"] or "")


def parse_tasks(text: str) -> tuple[tuple[range, ...], bool]:
    """(task numbers, whether some are missing) of a list such as `1,3-5,0-9:2%4`. What cannot be read counts as missing."""
    tasks, cut = [], False
    for item in text.partition("%")[0].split(","):
        found = _TASKS.fullmatch(item.strip())
        if found and max(map(len, filter(None, found.groups()))) < 10:
            first, last, step = int(found[1]), int(found[2] or found[1]), int(found[3] or 1)
            tasks.append(range(first, last + 1, step or 1))
        else:
            cut = True
    return tuple(tasks), cut


def parse_state(text: str) -> str:
    """Slurm's word for a state, in capitals, whole. A word that is cut (`OUT_OF_ME+`) is completed where one word alone begins so.

    A word of no set is returned as it is, and nothing at all is UNKNOWN.
    """
    words = text.split()
    if not words:
        return UNKNOWN
    word = words[0].upper()
    if not word.endswith("+"):
        return word
    stem = word.rstrip("+")
    whole = [stem] if stem in _WORDS else [each for each in _WORDS if each.startswith(stem)]
    return whole[0] if len(whole) == 1 else word


def parse_sbatch(text: str) -> str:
    """The job id that sbatch printed, in a line that holds nothing else; empty without such a line. A banner may stand around it."""
    rows = [line.strip() for line in text.splitlines()]
    found = [match[1] for form in (_BARE, _SENTENCE) for row in rows if (match := form.fullmatch(row))]
    return found[-1] if found else ""


def read_squeue(text: str) -> Answer:
    """Read `squeue --format=%i|%T|%N|%r|%S`."""

    def line(parts: list[str]) -> Line | None:
        ids = parse_ids(parts[0]) if len(parts) == 5 else None
        if ids is None:
            return None
        _, state, node, reason, start = parts
        known = start if start not in ("N/A", "Unknown", "") else ""
        return Line(ids, parse_state(state), _blank(node), _blank(reason), known)

    return _read_columns(text, line)


def read_sacct(text: str) -> Answer:
    """Read `sacct -P -o JobID,State,NodeList,ExitCode,End`; the last column may be missing."""

    def line(parts: list[str]) -> Line | None:
        ids = parse_ids(parts[0]) if len(parts) in (4, 5) else None
        if ids is None:
            return None
        # In "CANCELLED by 1000" the user is the reason; the state is the first word.
        rest, ended_at = parts[1].strip().partition(" ")[2], (parts[4] if len(parts) == 5 else "")
        known = ended_at if ended_at not in ("Unknown", "None", "N/A") else ""
        return Line(ids, parse_state(parts[1]), _blank(parts[2]), rest or parts[3], "", known)

    return _read_columns(text, line)


def read_scontrol(text: str) -> Answer:
    """Read `scontrol --oneliner show job`. A value may hold blanks; the first word with a key's name is its value, as names come late."""
    lines, unread = [], []
    for row in filter(str.strip, text.splitlines()):
        values: dict[str, str] = {}
        for key, value in re.findall(r"(?:^|\s)(\w+)=(\S*)", row):
            values.setdefault(key, value)
        if values.get("JobId", "").isdigit() and "JobState" in values:
            lines.append(Line(_ids_of(values), parse_state(values["JobState"]), _blank(values.get("NodeList", "")),
                              _blank(values.get("Reason", "")), _start_of(values)))  # fmt: skip
        elif not _NO_JOB.match(row.strip()):
            unread.append(row.strip())
    return Answer(lines, unread, bool(text.strip()))


def _ids_of(values: dict[str, str]) -> JobIds:
    array, tasks = values.get("ArrayJobId", ""), values.get("ArrayTaskId", "")
    if not array.isdigit() or not tasks:
        return JobIds(values["JobId"])
    numbers, cut = parse_tasks(tasks)
    return JobIds(array, numbers, cut)


def _start_of(values: dict[str, str]) -> str:
    start = values.get("StartTime", "")
    return "" if start in ("Unknown", "N/A", "None") else start


def _read_columns(text: str, parse: Callable[[list[str]], Line | None]) -> Answer:
    lines, unread = [], []
    for row in filter(str.strip, text.splitlines()):
        line = parse([part.strip() for part in row.split("|")])
        if line is not None:
            lines.append(line)
        elif not _NO_JOB.match(row.strip()):
            unread.append(row.strip())
    return Answer(lines, unread, bool(text.strip()))


def _blank(text: str) -> str:
    return "" if text in ("None", "(null)", "None assigned", "N/A", "(None)") else text


def explain_reason(reason: str) -> Explanation | None:
    """What a reason for waiting means; None for a word that no table of ours knows, which is then shown as it is."""
    return next((told for pattern, told in _REASONS if pattern.match(reason.strip("( )"))), None)


def describe_reason(reason: str) -> str:
    """The reason as `status` shows it: Slurm's word, whether somebody must act, and one sentence."""
    told = explain_reason(reason) if reason else None
    if told is None:
        return reason
    return f"{reason}: {'needs a person, ' if told.needs_person else ''}{told.sentence}"
