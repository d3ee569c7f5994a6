"""Scripted campaigns that a page tells of: one with everything that a page can show, one with a reversal and its files, one that failed."""

import ast
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

from pipeline.campaign import canonical
from pipeline.campaign.records import Arm
from pipeline.decision import derive, history, proposal_gate, proposals
from pipeline.stats.design import Design
from tests.support import logs
from tests.support.logs import HARD, LogCampaign, Truth
from tests.support.paths import ROOT
from tests.support.sealed import SealedCampaign

BEGAN = 1_764_000_000.0


def refusal_codes() -> Mapping[str, str]:
    """Code -> article of every refusal in the code: those of proposals, and each `Refused("4", "daily_cap", ...)`."""
    found = {code: "14" for code in proposals.ANSWER_CODES} | dict(proposal_gate.CODES)
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Refused":
                article, code = node.args[:2]
                if isinstance(article, ast.Constant) and isinstance(code, ast.Constant):
                    found[code.value] = article.value
    return found


def everything_world(name: str, arm: Arm) -> Truth:
    """As `logs.walk`; besides, an arm of round 3 learns dev items of a family, and in round 4 the board runs ahead."""
    number, truth = int(name[1:]), logs.walk(name, arm)
    if number == 3 and arm.axis == "lora_rank":
        truth = replace(truth, learned={**truth.learned, "text_cipher": 0.07})
    return replace(truth, board=0.12) if number == 4 else truth


@cache
def everything() -> LogCampaign:
    """Four rounds with every family state, every kind of refusal and every article, as a log alone. Nobody changes it."""
    campaign = LogCampaign(everything_world, logs.SCRIPTED)
    for _ in range(4):
        campaign.play()
    newest = sorted(campaign.derived)[-1]
    for number, (code, article) in enumerate(sorted(refusal_codes().items())):
        campaign.add(
            "refusal", round=newest, number=number, slot=1, article=article, code=code, what=f"refused as {code}"
        )
    return campaign


@dataclass
class Reversal(SealedCampaign):
    """A campaign with all its files: marks and curves of the workers, too, and a board that prints what is true."""

    def submit(self, name: str, arms: tuple[Arm, ...]) -> None:
        self.add(
            history.CHOSEN, round=name, arms=list(derive.choose_submissions(history.read_history(self.records), name))
        )
        chosen = self.records[-1]["arms"]
        if name == "r0001":
            for _ in range(2):
                self.score(name, "reference", sum(self.levels.values()) / len(self.levels))
        truths = {arm.name: self.world(name, arm) for arm in arms}
        for arm in chosen:
            gain, lost = truths[arm].gain, truths[arm].lost
            kept = [level + gain.get(family, 0) - lost.get(family, 0) for family, level in self.levels.items()]
            self.score(name, arm, sum(kept) / len(kept))

    def attempt(self, name: str, arm: Arm, status: str = "completed", exit_class: str = "completed") -> tuple[str, str]:
        if not (arm.role == "reference" and name != "r0000"):
            self._work(name, arm, exit_class if status != "completed" else "")
        return super().attempt(name, arm, status, exit_class)

    def _work(self, name: str, arm: Arm, failure: str) -> None:
        """What an arm's worker and its training write: 40 steps, or 12 until the loss is no number any more."""
        place = f"rounds/{name}/{arm.name}/attempt_00"
        began = BEGAN + 86400 * int(name[1:]) + 40 * arm.index + 300
        luck = int(hashlib.sha256(place.encode()).hexdigest()[:4], 16) / 65536
        steps = 12 if failure else 40
        lines = [{"phase": "start", "seconds": 10.0}]
        for n in range(1, steps + 1):
            loss = (
                1.9 * math.exp(-n / (9 + 4 * luck))
                + 0.35
                + 0.1 * luck
                + 0.06 * math.sin(7.1 * n + 9 * luck) / math.sqrt(n)
            )
            loss += 0.02 * max(0, n - 5) ** 2 if failure else 0
            lines.append({
                "phase": "train", "step": n, "num_steps": 40, "loss": round(loss, 4), "grad_norm": 0.5, "learning_rate": 0.001,
                "tokens": 1000 * n, "seconds": 60.0 * n,
            })  # fmt: skip
        marks = [("claim", 0.0, ""), ("train_start", 20.0, ""), ("train", 30.0, ""), ("check", 30.0 + 60 * steps, "")]
        marks += (
            [("failed", 40.0 + 60 * steps, "the loss is not finite")]
            if failure
            else [("completed", 400.0 + 60 * steps, "")]
        )
        self.files[f"{place}/progress.jsonl"] = "".join(json.dumps(line) + "\n" for line in lines).encode()
        self.files[f"{place}/phases.jsonl"] = "".join(
            json.dumps({"phase": phase, "at": began + at, "detail": detail}) + "\n" for phase, at, detail in marks
        ).encode()
        submitted = {
            "kind": "slurm",
            "submitted_at": f"2025-11-{24 + int(name[1:])}T16:00:00+00:00",
            "array_job_ids": ["7"],
        }
        self.files[f"rounds/{name}/submitted.json"] = canonical.encoded(submitted)


def reversal_world(name: str, arm: Arm) -> Truth:
    """From round 2 on, what most arms gain in gravity is dev items; one axis is truly good, one diverges, and one ruins everything."""
    number = int(name[1:])
    if arm.role == "anchor" or arm.replicate_of == "reference":
        return Truth()
    if number == 2 and arm.axis == "schedule":
        return Truth(missing="diverged")
    gain = dict.fromkeys(logs.LEVELS, 0.02 * (number - 1))
    if arm.axis == "lora_rank":
        gain = dict.fromkeys(logs.LEVELS, 0.03 * number) | {HARD: 0.12}
    if arm.axis == "clip_norm" and number == 1:
        gain = dict.fromkeys(logs.LEVELS, -0.35)
    return Truth(gain, {"gravity": 0.13, "roman": 0.05} if number in (2, 3) else {})


def failed_world(name: str, arm: Arm) -> Truth:
    return Truth(missing="out_of_memory" if arm.index % 2 else "diverged") if arm.index not in (0, 4) else Truth()


def reversal(folder: Path, rounds: int = 4, num_items: int = 300) -> Path:
    """Write a campaign with a reversal into a folder. num_items: of a family in each set."""
    campaign = Reversal(
        reversal_world,
        levels=logs.LEVELS,
        num_items=num_items,
        campaign="reversal-7d41",
        key=folder.with_suffix(".pem"),
    )
    for _ in range(rounds):
        campaign.play()
    return campaign.write(folder)


def failed(folder: Path) -> Path:
    """Write a campaign whose first round ends undecided: six of eight arms have no score."""
    campaign = Reversal(failed_world, campaign="failed-19c0", key=folder.with_suffix(".pem"))
    campaign.play()
    return campaign.write(folder)


def with_design(world: logs.World, rounds: int) -> LogCampaign:
    """A campaign as a log alone, of so many rounds of a small design."""
    campaign = LogCampaign(world, Design(rounds=8, submissions=2))
    for _ in range(rounds):
        campaign.play()
    return campaign


class Read(HTMLParser):
    """A page as its readers have it: `text` without tags, `ids`, `links`, `tags` with attributes, `headings` as levels, `rows` of cells."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[int] = []
        self.rows: list[list[str]] = []
        self._texts: list[str] = []
        self._hidden = 0
        self._in_cell = False
        self.feed(page)
        self.text = " ".join("".join(self._texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self.ids += [found["id"]] if found.get("id") else []  # type: ignore[list-item]
        self.links += [found["href"]] if found.get("href") else []  # type: ignore[list-item]
        self.headings += [int(tag[1])] if len(tag) == 2 and tag[0] == "h" and tag[1].isdigit() else []
        self._hidden += tag == "style"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True
        if tag in ("li", "p", "td", "th", "tr", "dt", "dd", "text", "span", "h1", "h2", "h3"):
            self._texts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag == "style"
        if tag in ("td", "th"):
            self._in_cell = False
        if tag in ("td", "th", "text"):
            self._texts.append(" ")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._texts.append(data)
            if self._in_cell:
                self.rows[-1][-1] += data
