"""Run Slurm's client programs in a clean environment, and tell silence from an answer.

A shell profile that exports SQUEUE_STATES=RUNNING, SLURM_TIME_FORMAT or SLURM_CLUSTERS changes what the clients print, and a job's own
SLURM_* variables do too. The clients run without them; SLURM_CONF and the token of SLURM_JWT stay, because they say which Slurm to ask.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pipeline.campaign.errors import WorkFailed

TIMEOUT_SECONDS = 15.0
COMPLAINT_SIGNS = 1000
KEPT = ("SLURM_CONF", "SLURM_JWT")
PREFIXES = ("SACCT_", "SBATCH_", "SCANCEL_", "SCONTROL_", "SINFO_", "SLURM_", "SQUEUE_", "SRUN_")
ENDED_ALREADY = re.compile(r"invalid job id|already (completing|completed)", re.IGNORECASE)
FAILED = ("down", "fail")  # beginnings of the states of a node that failed: down, down*, fail, failing
FIXED = {"SLURM_BITSTR_LEN": "0", "SLURM_TIME_FORMAT": "standard"}  # lists of array tasks whole, ISO times


@dataclass(frozen=True)
class Output:
    """What a client printed. error: one line of what it complained of; empty if it worked. failed: it ended badly, or not at all.

    stderr: all that it complained of.
    """

    text: str
    error: str = ""
    failed: bool = False
    stderr: str = ""

    @property
    def complaint(self) -> str:
        """All that it complained of, or else printed, in one line. A site's plugin may explain a refusal in many: of a long text both ends stay."""
        rows = [" ".join(row.split()) for row in (self.stderr.strip() or self.error or self.text).splitlines()]
        text = "".join(sign if sign.isprintable() else "?" for sign in "; ".join(filter(None, rows)))
        half = COMPLAINT_SIGNS // 2
        return text if len(text) <= COMPLAINT_SIGNS else f"{text[:half]} [...] {text[-half:]}"


def ignored(environ: Mapping[str, str]) -> list[str]:
    """The names of the variables in `environ` that would change what Slurm's clients do, and that this pipeline ignores."""
    return sorted(name for name in environ if name.startswith(PREFIXES) and name not in KEPT)


def run(*command: str, timeout_seconds: float | None = None) -> Output:
    """Run a client. It never raises: a missing, hanging or failing client has an error. timeout_seconds: TIMEOUT_SECONDS by default."""
    limit = timeout_seconds or TIMEOUT_SECONDS
    hidden = set(ignored(os.environ))
    environ = {name: value for name, value in os.environ.items() if name not in hidden} | FIXED
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=limit, env=environ)
    except subprocess.TimeoutExpired:
        return Output("", f"{command[0]} did not answer within {limit:g} s", True)
    except OSError as error:
        return Output("", f"{command[0]} cannot be run: {error.strerror or error}", True)
    failed = bool(done.returncode)
    told = next((line.strip() for line in done.stderr.splitlines() if line.strip()), "")
    complaint = f"{command[0]} ended with exit code {done.returncode}" if failed else ""
    if told:
        complaint = told if told.startswith(f"{command[0]}:") else f"{command[0]}: {told}"
    return Output(done.stdout, complaint, failed, done.stderr)


def cluster_name() -> str:
    """The name of the cluster that Slurm's clients ask here; empty where no controller answers."""
    found = re.search(r"^ClusterName\s*= (\S+)$", output_of("scontrol", "show", "config"), re.MULTILINE)
    return found[1] if found else ""


def output_of(*command: str, timeout_seconds: float | None = None) -> str:
    """The standard output of a client; empty if it is missing or hangs."""
    return run(*command, timeout_seconds=timeout_seconds).text


def controller_answers() -> bool:
    """Whether a Slurm controller answers on this host. It does not if it is down, or if SLURM_CONF is missing."""
    return " is UP" in output_of("scontrol", "ping")


def cancel_jobs(job_ids: Sequence[str]) -> None:
    """Cancel jobs. One that ended meanwhile is no error. Raises WorkFailed with Slurm's sentence if a job cannot be cancelled."""
    if not job_ids:
        return
    done = run("scancel", *job_ids)
    complaints = [line for line in (done.stderr or done.error).splitlines() if not ENDED_ALREADY.search(line)]
    if done.failed and complaints:
        raise WorkFailed(
            f"scancel failed: {complaints[0].removeprefix('scancel: ')}",
            "Check with `squeue --me` whether the job is yours",
        )


def failed_nodes(nodes: Collection[str]) -> set[str]:
    """Those of the nodes that are down or failing, or do not answer the controller, as sinfo says; none where it does not say."""
    if not nodes:
        return set()
    said = output_of("sinfo", "--noheader", "--Node", f"--nodes={','.join(sorted(nodes))}", "--format=%N|%T")
    states = dict(line.strip().split("|", 1) for line in said.splitlines() if line.count("|") == 1)
    return {
        node for node, state in states.items() if node in nodes and (state.endswith("*") or state.startswith(FAILED))
    }
