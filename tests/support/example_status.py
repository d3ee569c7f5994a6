"""The picture of a running round in the README. `python -m tests.support.example_status docs/status.svg` writes it.

The round is scripted: tests/golden/running_round.json says where each arm is at one moment, and has the marks of the workers and the training
lines of a round that ran (which one, it says too). They are written as a worker leaves them, and what is drawn is what `status --watch` draws.
"""

import io
import json
import os
import re
import sys
import tempfile
import time
from argparse import Namespace
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.campaign.layout import Attempt, Campaign, Round
from pipeline.cli import show_round
from pipeline.cluster.slurm_jobs import Job, Report
from pipeline.live import screen, view
from pipeline.rounds import freeze
from pipeline.rounds.init import init
from tests.support.campaigns import publish, publish_reference
from tests.support.paths import ROOT
from tests.support.running import marked

RECORDED = json.loads((ROOT / "tests" / "golden" / "running_round.json").read_text())
WIDTH, HEIGHT = 100, 30
SITE = ["cluster=slurm", "cluster.gpus_per_node=0"]
# The picture would load a font from another site.
FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


def line(values: list[Any]) -> str:
    """A line of progress.jsonl from its recorded values."""
    if len(values) == 1:
        return json.dumps({"phase": "start", "seconds": values[0]}) + "\n"
    names = ("step", "num_steps", "loss", "tokens", "seconds")
    return json.dumps({"phase": "train", **dict(zip(names, values, strict=True))}) + "\n"


def play(folder: Round, arm: str, at: dict[str, Any]) -> None:
    """Write the files of an arm that has come as far as `at` says."""
    recorded = RECORDED["arms"].get(f"{folder.name}/{arm}")
    if recorded is None:
        return
    attempt = folder.claim_attempt(arm)
    attempt.claim.write_text(
        json.dumps({"host": f"n{1 + int(arm[1]) % 4}", "pid": 1, "slurm_job_id": "41", "node": ""})
    )
    lines = [each for each in recorded["progress"] if len(each) == 1 or each[0] <= at["steps"]]
    if at["steps"]:
        attempt.progress.write_text("".join(map(line, lines)))
    phases = dict(recorded["phases"])
    began = {name: phases[name] for name in phases if phases[name] <= phases[_phase(at)]}
    upto = phases["completed"] if at.get("is_over") else phases["train_start"] + lines[0][0] + lines[-1][-1]
    if "decoded" in at:
        took = phases["score"] - phases["generate_start"]
        upto = phases["generate_start"] + took * at["decoded"] / RECORDED_ITEMS
    if not at["steps"]:
        upto = phases["train_start"] + lines[0][0] / 2
    if _phase(at) == "train_start":
        began.pop("train", None)
    marked(attempt, [(name, upto - when) for name, when in began.items()])
    if "decoded" in at:
        decode(attempt, at["decoded"], upto - phases["generate_start"])
    if at.get("is_over"):
        publish(folder, arm)
    if "saved_step" in at:
        (attempt.saved_dir / "000001" / "checkpoints" / f"step_{at['saved_step']:06d}").mkdir(parents=True)


RECORDED_ITEMS = 600


def _phase(at: dict[str, Any]) -> str:
    return "completed" if at.get("is_over") else "generate_start" if "decoded" in at else "train_start"


def decode(attempt: Attempt, items: int, seconds: float) -> None:
    """Write the journal of an arm that has decoded so many items in so many seconds."""
    attempt.decoded_dir.mkdir()
    journal = attempt.decoded_dir / "journal.00.0.jsonl"
    journal.write_text('{"work": "recorded"}\n' + '{"set": "dev"}\n' * items)
    now = time.time()
    os.utime(attempt.phases, (now - seconds, now - seconds))
    os.utime(journal, (now, now))


def picture() -> str:
    """The screen as SVG."""
    from rich.console import Console
    from rich.terminal_theme import SVG_EXPORT_THEME, TerminalTheme

    at_home = Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)  # so that commands name runs/demo
        try:
            found, lines = scripted(Campaign.at("runs/demo"))
        finally:
            os.chdir(at_home)
    console = Console(
        record=True, width=WIDTH, force_terminal=True, color_system="truecolor", file=io.StringIO(), highlight=False
    )
    console.print(screen.draw(found, lines, WIDTH, HEIGHT))
    base = SVG_EXPORT_THEME
    # Lighter letters than the library's, whose dimmed ones have too little contrast.
    theme = TerminalTheme(base.background_color, (238, 240, 238), [tuple(base.ansi_colors[n]) for n in range(8)])
    return FONT.sub("", console.export_svg(title="python -m pipeline status runs/demo --watch", theme=theme))


def scripted(campaign: Campaign) -> tuple[view.RoundView, list[str]]:
    """The view of the scripted round, and the lines below it."""
    init(campaign, ["experiment=demo", *SITE])
    folder = freeze.freeze(campaign, "r0001", ["experiment=demo", *SITE])
    publish_reference(campaign, folder)
    publish(campaign.round("r0000"), "a1")
    jobs = {"meta": Job("42", "PENDING", reason="Dependency")}
    for name, at in RECORDED["moment"].items():
        of, arm = name.split("/")
        play(campaign.round(of), arm, at)
        state, reason, start = at.get("job", ["RUNNING", "", None])
        starts = datetime.fromtimestamp(time.time() + start).isoformat(timespec="seconds") if start else ""
        jobs[name] = Job(f"41_{arm[1]}", state, reason=reason, expected_start=starts)
    folder.submitted.write_text(json.dumps({"kind": "slurm", "array_job_ids": ["41"], "meta_job_id": "42"}))
    said = Report(jobs)
    found = view.of_round(campaign, folder, said)
    arguments = Namespace(campaign=Path("runs/demo"), round=None, watch=True)
    return found, show_round.below(campaign, folder, found, said, arguments)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture())
