"""Arms that run, as a worker and a trial leave their files, without any process."""

import json
import time
from collections.abc import Iterable

from pipeline.campaign.layout import Attempt, Round

STEP_SECONDS = 2.0


def line(step: int, num_steps: int, **values: object) -> str:
    """A training line; the loss is 3 / step, and a step takes STEP_SECONDS."""
    fields: dict[str, object] = {"loss": 3 / step, "grad_norm": 0.5, "learning_rate": 0.002}
    fields |= {"tokens": 100 * step, "seconds": STEP_SECONDS * step}
    return json.dumps({"phase": "train", "step": step, "num_steps": num_steps} | fields | values) + "\n"


def marked(attempt: Attempt, phases: Iterable[tuple[str, float]]) -> None:
    """Write the marks of phases that began so many seconds ago."""
    now = time.time()
    lines = [json.dumps({"phase": phase, "at": round(now - ago, 3), "detail": ""}) for phase, ago in phases]
    attempt.phases.write_text("".join(f"{text}\n" for text in lines))


def training(folder: Round, arm: str, steps: int, num_steps: int = 20) -> Attempt:
    """An attempt that has made so many steps; nobody knows of a process."""
    attempt = folder.claim_attempt(arm)
    attempt.claim.write_text(json.dumps({"host": "elsewhere", "pid": 1, "slurm_job_id": "", "node": ""}))
    spent = STEP_SECONDS * steps
    marked(attempt, [("claim", spent + 8), ("mount", spent + 7), ("train_start", spent + 5)])
    attempt.progress.write_text(
        '{"phase": "start", "seconds": 5.0}\n' + "".join(line(n, num_steps) for n in range(1, steps + 1))
    )
    return attempt
