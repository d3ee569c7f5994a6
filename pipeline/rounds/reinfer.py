"""A spot check that adapters give the scores in the log: decode random items of closed rounds again and compare the accuracies.

The check draws one scored arm of each closed round, and N fresh items a family, with the operating system's random numbers, which whoever
made the campaign cannot have known. It compares accuracies and not texts, because float32 sums depend on the shape of a batch, so that a
completion may differ where two tokens are nearly equal. A difference of more than two points and one item is a finding.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from pipeline.audit import rescore
from pipeline.audit.findings import Report
from pipeline.campaign.errors import PipelineError
from pipeline.campaign.files import read_json_lines
from pipeline.config import settings
from pipeline.execution import judge
from pipeline.sandbox import entries, image

Record = Mapping[str, Any]
TOLERANCE = Fraction(1, 50)


def reinfer(folder: Path, num_items: int, report: Report) -> None:
    """Decode items of every closed round again and add the results to `report`. num_items: how many to draw a family.

    The caller has entered a private mount namespace. An arm whose adapter or seed is missing is reported as not verifiable.
    """
    records = rescore.records_of(folder)
    with rescore.payload(folder, records[0]["facts"], report) as root:
        for outcome in draw_outcomes(records) if root else []:
            name = f"{outcome['arm']} of {outcome['round']}"
            adapter, seeds = adapter_of(folder, outcome, records), rescore.seeds_of("fresh", outcome["round"], records)
            if root is None or seeds is None or adapter is None:
                report.unknown(f"{name} was not decoded again, because its adapter or its seed is missing")
                continue
            with tempfile.TemporaryDirectory(prefix="reinfer-") as scratch:
                try:
                    decode_and_compare(folder, outcome, adapter, seeds, num_items, root, Path(scratch), records, report)
                except PipelineError as error:
                    report.unknown(f"{name} could not be decoded again here: {error}")


def draw_outcomes(records: Sequence[Record]) -> list[Record]:
    """For each closed round the newest outcome of one random arm that was scored on fresh items."""
    closed = sorted({record["round"] for record in records if record["event"] == "close"})
    newest = {(r["round"], r["arm"]): r for r in records if r["event"] == "outcome" and r["arm"] != "reference"}
    chance, outcomes = random.SystemRandom(), []
    for name in closed:
        scored = [
            r for (of_round, _), r in newest.items() if of_round == name and r["outcome"]["outcomes"].get("fresh")
        ]
        outcomes += [chance.choice(scored)] if scored else []
    return outcomes


def adapter_of(folder: Path, outcome: Record, records: Sequence[Record]) -> Path | None:
    """The folder of the adapter of an outcome; None if it was not kept."""
    digest = outcome["outcome"]["result_digest"]
    for record in records:
        if record["event"] == "attempt" and digest in record["files"].values():
            path = folder / "rounds" / record["round"] / record["arm"] / f"attempt_{record['attempt']:02d}" / "adapter"
            return path if path.is_dir() else None
    return None


def decode_and_compare(
    folder: Path, outcome: Record, adapter: Path, seeds: Mapping[str, str], num_items: int, root: Path, scratch: Path,
    records: Sequence[Record], report: Report,
) -> None:  # fmt: skip
    """Draw items, decode and score them in the pristine image, and compare the accuracies. Raises PipelineError if the image cannot be run."""
    name, arm = outcome["round"], outcome["arm"]
    tasks = next(r["tasks"] for r in records if r["event"] == "basis" and r["round"] == name)
    items = rescore.make_items(root, seeds, tasks, tasks["num_fresh_per_family"], scratch / "items")
    before = drawn_items(items, outcome["outcome"]["outcomes"]["fresh"], num_items, scratch / "drawn")
    planned = next(r["plan"] for r in records if r["event"] == "plan" and r["round"] == name)
    overrides = next(planned_arm["overrides"] for planned_arm in planned["arms"] if f"a{planned_arm['index']}" == arm)
    chosen = settings.load(folder / "rounds" / name / "config.yaml")
    chosen = settings.with_overrides(chosen, [(key, value) for key, value in overrides])
    digest = records[0]["facts"]["image"]["tree_digest"]
    with image.mounted(folder / "image" / "substrate.sqsh", digest, scratch) as mount:
        judged = judge.judge(
            mount.root, chosen, adapter, {}, scratch, scratch / "judge.log", item_folders={"fresh": scratch / "drawn"}
        )
    now = {row["item_id"]: bool(row["correct"]) for row in judged.items["fresh"]}
    compare(outcome, before, now, report)


def drawn_items(items: Path, marks: Mapping[str, str], num_items: int, drawn_dir: Path) -> dict[str, bool]:
    """Write prompts and answers of random items into a folder. Returns item id -> whether the log says that it was right.

    items: folder of the whole set. marks: family -> outcome string in the log. num_items: how many to draw a family.
    """
    prompts = read_json_lines(items / "prompts.jsonl")
    chance, logged = random.SystemRandom(), dict[str, bool]()
    for family, text in marks.items():
        ids = [row["item_id"] for row in prompts if row["family"] == family]
        right = dict(zip(ids, (mark == "1" for mark in text), strict=False))
        logged |= {item: right[item] for item in chance.sample(sorted(right), min(num_items, len(right)))}
    drawn_dir.mkdir()
    for name in entries.ITEM_FILES:
        rows = zip(
            read_json_lines(items / name), (items / name).read_text("utf-8").splitlines(keepends=True), strict=True
        )
        (drawn_dir / name).write_text("".join(line for row, line in rows if row["item_id"] in logged), "utf-8")
    return logged


def compare(outcome: Record, before: Mapping[str, bool], now: Mapping[str, bool], report: Report) -> None:
    """Compare the accuracies on the same items. A difference beyond the tolerance is a finding.

    before, now: item id -> whether it was right, in the log and decoded again.
    """
    name, size = f"{outcome['arm']} of {outcome['round']}", len(before)
    was, new = sum(before.values()), sum(now.values())
    changed = sum(before[item] != now.get(item) for item in before)
    counts = f"{name}: {was} of {size} items right in the log, {new} decoded again, {changed} marks differ"
    if abs(was - new) > TOLERANCE * size + 1:
        report.record(outcome["seq"], f"{counts}; the difference is more than 2 points and one item")
    else:
        report.verified.append(f"{counts} (the tolerance is 2 points and one item)")
