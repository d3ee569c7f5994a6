"""Run real campaigns of the tiny model with a narrow dev set, with a fair one, and under the greedy rule, for several seeds, and compare them.

    python -m studies.narrow_dev.campaigns FOLDER --seeds 1 2 3 4 5     run what is missing; type it again after a stop
    python -m studies.narrow_dev.campaigns FOLDER --table               the tables of what is there, as markdown

Each campaign has four rounds of eight arms (hydra_conf/experiment/reversal*.yaml). Afterwards its image judges the adapter that goes out, and
the reference's, on ITEMS further items of each family. They are drawn as fresh items and the board's are, and all campaigns get the same,
so that differences are paired by item. docs/reversal.md has the tables that this made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.campaign import facts
from pipeline.campaign.files import read_json, write_file
from pipeline.campaign.layout import CODE_ROOT, Campaign
from pipeline.campaign.log import Log
from pipeline.config import settings
from pipeline.decision.family_states import OVERFIT, SHIFT, SUSPECT
from pipeline.decision.history import History, read_history
from pipeline.execution import judge, results
from pipeline.sandbox import namespace

KINDS = ("reversal", "reversal_greedy", "reversal_healthy")
ROUNDS, ITEMS = 4, 500
REVERSED = (OVERFIT, SHIFT)
SEED = hashlib.sha256(b"studies/narrow_dev").hexdigest()  # of the further items, which no campaign has


@dataclass(frozen=True)
class Ended:
    """One campaign. `suspected`, `alarmed`: family -> the number of the first round in which it was SUSPECT, and in which a test raised an
    alarm in it (of the whole family or of one arm). `right`: the marks of the adapter that goes out on the further items, one a character;
    `reference`: those of the reference."""

    kind: str
    seed: int
    minutes: float
    suspected: Mapping[str, int]
    alarmed: Mapping[str, int]
    out: tuple[str, str]
    setting: str
    printed: str
    right: str
    reference: str

    @property
    def accuracy(self) -> float:
        """On the further items, from 0 to 1."""
        return self.right.count("1") / len(self.right)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the words, run what is missing, and print the tables. Returns the exit code."""
    words = argparse.ArgumentParser(
        prog="python -m studies.narrow_dev.campaigns", description=(__doc__ or "").split("\n")[0]
    )
    words.add_argument("folder", type=Path, metavar="FOLDER", help="gets a campaign for each kind and seed")
    words.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], metavar="N")
    words.add_argument("--table", action="store_true", help="run nothing")
    words.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides of every campaign, after --")
    asked = words.parse_args(argv)
    if not asked.table:
        # The image is mounted here to judge what goes out.
        os.environ["PYTHONPATH"] = str(CODE_ROOT)
        namespace.enter_private_namespace(
            [sys.executable, "-P", "-m", "studies.narrow_dev.campaigns", *(argv or sys.argv[1:])]
        )
        for seed in asked.seeds:
            for kind in KINDS:
                run(asked.folder, kind, seed, asked.overrides)
    found = list(ended(asked.folder))
    print("\n".join([*campaign_table(found), "", *pair_table(found)]))
    return 0


def run(folder: Path, kind: str, seed: int, overrides: Sequence[str]) -> None:
    """Run a campaign to its end, or on from where it stopped, and judge what goes out. Raises CalledProcessError where a command failed."""
    campaign, done = Campaign(folder / f"{kind}_{seed}"), folder / f"{kind}_{seed}.json"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pipeline", "campaign", str(campaign.folder), "--rounds", str(ROUNDS)]
    print(f"{kind}, seed {seed}: {campaign.folder}", file=sys.stderr, flush=True)
    began, spent = time.monotonic(), folder / f"{kind}_{seed}.seconds"  # a line for each start
    try:
        with open(folder / f"{kind}_{seed}.log", "a") as log:
            words = [*command, f"experiment={kind}", f"seed={seed}", *overrides]
            subprocess.run(words, stdout=log, stderr=log, check=True)
    finally:
        with open(spent, "a") as lines:
            lines.write(f"{time.monotonic() - began}\n")
    seconds = sum(map(float, spent.read_text().split()))
    name, arm = winner(read_history(Log(campaign.log).records()))
    marks = {"right": judged(campaign, name, arm, folder), "reference": judged(campaign, "r0000", "a0", folder)}
    write_file(done, json.dumps({"seconds": seconds, **marks}))


def winner(history: History) -> tuple[str, str]:
    """The (round, arm) that goes out by the last decision."""
    name, arm = history.decisions[f"r{ROUNDS:04d}"]["winner"]
    return name, arm


def found_in(campaign: Campaign, history: History) -> tuple[dict[str, int], dict[str, int]]:
    """`Ended.suspected` and `alarmed`."""
    suspected: dict[str, int] = {}
    alarmed: dict[str, int] = {}
    for name, decision in sorted(history.decisions.items()):
        look = read_json(campaign.round(name).evidence)["look"]
        for test in look["verdict"]["arm_alarms"] if look else []:
            alarmed.setdefault(test["family"], int(name[1:]))
        for family, state in decision["families"].items():
            if state["name"] in REVERSED:
                alarmed.setdefault(family, int(name[1:]))
            elif state["name"] == SUSPECT:
                suspected.setdefault(family, int(name[1:]))
    return suspected, alarmed


def judged(campaign: Campaign, name: str, arm: str, folder: Path) -> str:
    """Judge an arm's adapter on the further items by the campaign's own image. Returns a mark for each, families and items in order."""
    of_round = campaign.round(name)
    number = results.read_attributes(of_round.published(arm))["attempt"]
    adapter = next(attempt for attempt in of_round.attempts(arm) if attempt.number == number).adapter_dir
    chosen = settings.load(of_round.config)
    chosen = replace(chosen, tasks=replace(chosen.tasks, num_fresh_per_family=ITEMS))
    digest = facts.facts_of(campaign)["image"]["tree_digest"]
    marks = judge.judge_once(campaign.image, digest, chosen, adapter, {"fresh": SEED}, folder / "judging").items[
        "fresh"
    ]
    return "".join(str(int(row["correct"])) for row in marks)


def ended(folder: Path) -> Iterator[Ended]:
    """The campaigns that are complete, by kind and seed."""
    for kind in KINDS:
        for path in sorted(folder.glob(f"{kind}_[0-9]*.json")):
            content, campaign = read_json(path), Campaign(path.with_suffix(""))
            history = read_history(Log(campaign.log).records())
            name, arm = winner(history)
            moved = next(each for each in history.plans[name].arms if each.name == arm).overrides
            yield Ended(
                kind, int(path.stem.rpartition("_")[2]), content["seconds"] / 60, *found_in(campaign, history), (name, arm),
                ", ".join("=".join(each) for each in moved) or "the reference", str(history.scores.get(name, {}).get(arm, "-")),
                content["right"], content["reference"],
            )  # fmt: skip


def campaign_table(found: Sequence[Ended]) -> Iterator[str]:
    """One row for each campaign."""
    yield (
        "| campaign | seed | SUSPECT from round | alarm in round | what goes out | board printed | further items, % (95 %) | "
        "over the reference, points (95 %) | minutes |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for each in found:
        flags = [_flags(each.suspected), _flags(each.alarmed)]
        half = 196 * (each.accuracy * (1 - each.accuracy) / len(each.right)) ** 0.5
        yield (
            f"| {each.kind} | {each.seed} | {flags[0]} | {flags[1]} | {each.out[1]} of {each.out[0]}: {each.setting} | {each.printed} | "
            f"{100 * each.accuracy:.1f} ± {half:.1f} | {_difference(each.right, each.reference)} | {each.minutes:.1f} |"
        )


def _flags(first: Mapping[str, int]) -> str:
    return ", ".join(f"{number} ({family})" for family, number in sorted(first.items())) or "never"


def pair_table(found: Sequence[Ended]) -> Iterator[str]:
    """Ours minus greed's on the further items, by seed, and their mean with its standard error."""
    greedy = {each.seed: each for each in found if each.kind == "reversal_greedy"}
    pairs = [(each, greedy[each.seed]) for each in found if each.kind == "reversal" and each.seed in greedy]
    yield "| seed | what goes out of reversal minus of reversal_greedy, points (95 %) |"
    yield "|---|---|"
    for ours, theirs in pairs:
        yield f"| {ours.seed} | {_difference(ours.right, theirs.right)} |"
    if len(pairs) > 1:
        values = [100 * (ours.accuracy - theirs.accuracy) for ours, theirs in pairs]
        mean = sum(values) / len(values)
        error = (sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)) ** 0.5
        yield f"| mean | {mean:+.1f}, standard error {error:.1f} over {len(values)} seeds |"


def _difference(one: str, other: str) -> str:
    """The difference of two accuracies on the same items in points, with 1.96 standard errors of paired items."""
    won, lost = (sum(a == mark and b != mark for a, b in zip(one, other, strict=True)) for mark in "10")
    n = len(one)
    mean = (won - lost) / n
    half = 1.96 * ((won + lost) / n**2 - mean**2 / n) ** 0.5
    return f"{100 * mean:+.1f} ± {100 * half:.1f}"


if __name__ == "__main__":
    sys.exit(main())
