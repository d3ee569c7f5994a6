"""Campaigns with decided rounds, made from published arm files: the real meta stage decides them in a second."""

import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.campaign.layout import Campaign, Round
from pipeline.rounds import freeze, meta
from tests.support.campaigns import OVERRIDES, frozen_campaign, publish

BEST = "a2"
BEGAN = 1_764_000_000.0  # of every attempt here, in seconds since the epoch
STEPS = 10


def decided_campaign(parent: Path) -> Campaign:
    """Round 1 is decided: a2 is far above the reference, a1 diverged, and a6 never came. a0 and a2 have curves; a2 was resumed."""
    campaign = frozen_campaign(parent)
    folder = campaign.round("r0001")
    attempt(folder, "a0", 0, BEGAN, [start(), *steps(1, STEPS)])
    attempt(folder, BEST, 0, BEGAN, [start(), *steps(1, 6)])
    # The checkpoint was that of step 4, so steps 5 and 6 are made again, an hour later and with another loss.
    attempt(folder, BEST, 1, BEGAN + 3600, [start(), *steps(1, 4), start(), *steps(5, STEPS, loss=7.0)])
    for number in (0, 2, 3, 4, 5, 7):
        best = f"a{number}" == BEST
        publish(folder, f"a{number}", 38 if best else 20, attempt=int(best))
    publish(folder, "a1", None)
    meta.close(campaign, folder)
    return campaign


def with_open_round(campaign: Campaign) -> Campaign:
    """The same campaign with its second round frozen and one arm's score published, which nobody has judged yet."""
    folder = freeze.freeze(campaign, "r0002", OVERRIDES)
    attempt(folder, "a0", 0, BEGAN + 7200, [start(), *steps(1, 3)])
    publish(folder, "a0", 30)
    return campaign


def attempt(
    folder: Round, arm: str, number: int, began: float, lines: Sequence[object], *, trains: bool = True
) -> None:
    """What a worker keeps of a training: its steps began 20 seconds after the attempt. trains: if not, it judges what another trained."""
    place = folder.folder / arm / f"attempt_{number:02d}"
    place.mkdir(parents=True)
    marks = [("claim", 0), *([("train_start", 10), ("train", 20)] if trains else []), ("check", 100)]
    (place / "phases.jsonl").write_text(
        "".join(json.dumps({"phase": p, "at": began + s, "detail": ""}) + "\n" for p, s in marks)
    )
    (place / "progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def start() -> dict[str, object]:
    return {"phase": "start", "seconds": 10.0}


def steps(first: int, last: int, loss: float = 3.0) -> list[dict[str, object]]:
    """Lines of training steps that take two seconds and 100 tokens each."""
    return [
        {"phase": "train", "step": n, "num_steps": STEPS, "loss": loss / n, "grad_norm": 0.5, "learning_rate": 0.001 * n,
         "tokens": 100 * n, "seconds": 2.0 * n}
        for n in range(first, last + 1)
    ]  # fmt: skip
