"""Hand jobs to sbatch so that none is lost: every submission has a mark, by which its jobs are found whatever sbatch printed.

sbatch can fail after the controller took the job, a wrapper of the site can print numbers before the id, and this process can be killed
between two calls. Then an array would run beside the one that is submitted next. So a mark, written before the first job, stands in the
comment of each job:

    slurm/submissions/5f0c.open          jobs may run under this mark, and nobody has recorded them yet
    slurm/submissions/5f0c.kept          the campaign's files name these jobs
    slurm/submissions/5f0c.taken_back    these jobs were or are being cancelled; one that starts nevertheless refuses to work

submitit writes the script and pickles the stage; the call of sbatch is ours.
"""

from __future__ import annotations

import re
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit

from pipeline.campaign.errors import SlurmRefused, WorkFailed
from pipeline.cluster import slurm_answers, slurm_clients

SBATCH_SECONDS = 120.0
LOOKS = (0.0, 1.0, 2.0, 4.0, 8.0)  # seconds before each search for a job that an sbatch without an answer may have left
UNANSWERED = re.compile(
    r"timed? ?out|did not answer|unable to contact|zero bytes|connection (reset|refused)|(receive|send|communication).*(fail|error)|standby",
    re.IGNORECASE,
)


class Mark:
    """The mark of one submission, and its file in the folder of a round's jobs."""

    def __init__(self, folder: Path, word: str = "") -> None:
        self.word = word or uuid.uuid4().hex
        self.folder = folder / "submissions"

    def path(self, state: str) -> Path:
        """The file that the mark has in a state: `open`, `kept` or `taken_back`."""
        return self.folder / f"{self.word}.{state}"

    def open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path("open").touch(exist_ok=False)

    def keep(self) -> None:
        """Say that the campaign's files name the jobs."""
        self.path("open").rename(self.path("kept"))

    def take_back(self, names: Sequence[str]) -> list[str]:
        """Make jobs that start from now on refuse to work, and cancel those that Slurm has. Returns their ids. names: of the jobs.

        The mark stays open until that is done. Raises WorkFailed if Slurm does not answer or does not cancel them.
        """
        self.path("taken_back").touch()
        ids, error = marked_jobs(names, self.word)
        if error:
            raise WorkFailed(
                f"an earlier submission was cut short, and nobody knows whether its jobs run ({error})",
                "Make `squeue` answer in this shell, then run the command again",
            )
        slurm_clients.cancel_jobs(ids)
        self.path("open").unlink()
        return ids


def open_marks(folder: Path) -> list[Mark]:
    """The marks of submissions that were cut short. folder: the folder of a round's jobs."""
    return [Mark(folder, path.stem) for path in sorted((folder / "submissions").glob("*.open"))]


def marked_jobs(names: Sequence[str], mark: str) -> tuple[list[str], str]:
    """(ids of the jobs and arrays that wait or run with this mark in their comment, why that is not sure). names: of the jobs."""
    output = slurm_clients.run("squeue", "--all", f"--name={','.join(names)}", "--format=%F|%k")
    rows = [line.strip().partition("|") for line in output.text.splitlines()]
    ids = sorted({job_id for job_id, _, comment in rows if job_id.isdigit() and mark in comment}, key=int)
    silent = "squeue printed nothing, not even a header" if not rows else ""  # the header is ARRAY_JOB_ID|COMMENT
    return ids, output.error if output.failed else silent


class MarkedExecutor(submitit.SlurmExecutor):
    """submitit's executor with our own call of sbatch. mark: of the submission; each job adds a number to it."""

    def __init__(self, folder: Path, python: str, mark: Mark) -> None:
        super().__init__(folder, max_num_timeout=0, python=python)
        self._mark = mark

    def _internal_process_submissions(self, delayed_submissions: Any) -> list[Any]:
        """Submit one job, or one array for several stages."""
        scripts = submitit.core.utils.JobPaths.get_first_id_independent_folder(self.folder)
        scripts.mkdir(parents=True, exist_ok=True)
        pickles = [scripts / f"{uuid.uuid4().hex}.pkl" for _ in delayed_submissions]
        for delayed, path in zip(delayed_submissions, pickles, strict=True):
            delayed.set_timeout(self.parameters["time"], self.max_num_timeout)
            delayed.dump(path)
        number = len(pickles)
        job_id = self._sbatch(scripts, {"map_count": number} if number > 1 else {})
        ids = [f"{job_id}_{task}" for task in range(number)] if number > 1 else [job_id]
        jobs = [self.job_class(folder=self.folder, job_id=each, tasks=list(range(self._num_tasks()))) for each in ids]
        for job, path in zip(jobs, pickles, strict=True):
            job.paths.move_temporary_file(path, "submitted_pickle")
        return jobs

    def _sbatch(self, scripts: Path, parameters: dict[str, Any]) -> str:
        """Write the script, submit it and return the job's id. Raises WorkFailed with Slurm's own sentence."""
        mark = f"{self._mark.word}.{uuid.uuid4().hex[:4]}"
        comment = f"{self.parameters.get('comment', '')} submission={mark}".strip()
        text = submitit.slurm.slurm._make_sbatch_string(
            command=self._submitit_command_str,
            folder=self.folder,
            **{**self.parameters, **parameters, "comment": comment},
        )
        script = scripts / f"{mark}.sh"
        script.write_text(text)
        name = str(self.parameters["job_name"])
        done = slurm_clients.run("sbatch", str(script), timeout_seconds=SBATCH_SECONDS)
        job_id = job_of(name, mark, done)
        script.rename(scripts / f"{job_id}_submission.sh")
        return job_id


def job_of(name: str, mark: str, done: slurm_clients.Output) -> str:
    """The id of the job that an sbatch call submitted. name, mark: of the job. done: what sbatch printed.

    Raises WorkFailed if there is no such job, or if the printed id is of a job with another name.
    """
    printed = "" if done.failed else slurm_answers.parse_sbatch(done.text)
    if printed:
        named = slurm_clients.run("scontrol", "--oneliner", "show", "job", printed)
        is_unknown = "invalid job id" in named.stderr.lower()
        if f"JobName={name} " in named.text or not (is_unknown or "JobName=" in named.text):
            return printed
    for seconds in LOOKS if printed or not done.failed or UNANSWERED.search(done.stderr or done.error) else LOOKS[:1]:
        time.sleep(seconds)
        if found := marked_jobs([name], mark)[0]:
            print(f"sbatch said: {done.error or done.text.strip()!r}. Slurm has the job as {found[0]}", file=sys.stderr)
            return found[0]
    if done.failed:
        # Warnings come first and the refusal last, by which its kind is known.
        sentence = (done.stderr.strip().splitlines() or [done.error])[-1]
        if UNANSWERED.search(sentence):
            raise WorkFailed(
                f"sbatch failed: {done.complaint}", "Check with `scontrol ping` whether the controller is up"
            )
        raise SlurmRefused(f"sbatch refused {name}: {done.complaint}", "Check `sinfo` and the cluster settings")
    raise WorkFailed(
        f"sbatch printed {done.text.strip()!r}, in which no line is the id of a job named {name}",
        "A wrapper of the site may print a banner, but the line `Submitted batch job N` must stand by itself",
    )
