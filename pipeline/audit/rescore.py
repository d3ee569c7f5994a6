"""Items made again from the revealed seeds, completions scored again, data cards held against the items: by the image's own code.

The image is unpacked by unsquashfs and believed only if its tree digest is the frozen one; its entries `items`, `overlap` and `score` need
the standard library alone. They run as whoever audits, without a sandbox: read them first (substrate/ in the unpacked image), or audit
where it does not matter. Where image or unsquashfs are not there, that is said, and nothing is run.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.audit import check_files
from pipeline.audit.findings import Report
from pipeline.campaign import files, strict_json
from pipeline.campaign.errors import IntegrityError, PipelineError
from pipeline.sandbox import entries
from pipeline.sandbox.namespace import run_program

Record = Mapping[str, Any]
SETS = ("dev", "fresh")
MOST_SECONDS = 3600.0


def rescore(folder: Path, report: Report) -> None:
    """Every scored outcome of which seed and completions are there. For a campaign that `audit.examine` has read before."""
    records = records_of(folder)
    with payload(folder, records[0]["facts"], report) as root:
        if root is not None:
            with tempfile.TemporaryDirectory(prefix="rescore-") as scratch:
                Rescoring(folder, records, root, Path(scratch), report).run()


def records_of(folder: Path) -> list[dict[str, Any]]:
    """The log's whole records, whether or not their chain holds: that was looked at before. Raises ValueError for what is none."""
    lines = (folder / "log.jsonl").read_bytes().split(b"\n")[:-1]
    return [strict_json.read(line, numbers=strict_json.Numbers.WHOLE) for line in lines]


@contextmanager
def payload(folder: Path, facts: Mapping[str, Any], report: Report) -> Iterator[Path | None]:
    """The unpacked image, its tree digest compared; None, and why, where that cannot be."""
    sqsh = folder / "image" / "substrate.sqsh"
    if not sqsh.is_file() or shutil.which("unsquashfs") is None:
        what = "the image" if not sqsh.is_file() else "unsquashfs (squashfs-tools)"
        report.unknown(f"items and scores: {what} is not there to make them again with")
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="payload-") as scratch:
        root = Path(scratch, "payload")
        try:
            run_program("unsquashfs", "-quiet", "-no-progress", "-no-xattrs", "-dest", str(root), str(sqsh))
            found = files.tree_digest(root)
        except (PipelineError, OSError) as error:
            found = f"unreadable ({error})"
        if found != facts["image"]["tree_digest"]:
            report.file("image/substrate.sqsh", "does not unpack to the image that was frozen: nothing of it is run")
            yield None
            return
        report.verified.append("the image's tree digest")
        yield root


def run_entry(root: Path, entry: str, arguments: Sequence[str], work: Path) -> None:
    """One of the image's entries. Raises IntegrityError with its last words."""
    done = entries.run(root, entry, arguments, work, MOST_SECONDS)
    if done.returncode:
        raise IntegrityError(f"substrate.{entry} ended with {done.returncode}: {' '.join(done.stderr.split()[-30:])}")


def make_items(root: Path, seeds: Mapping[str, str], tasks: Mapping[str, Any], num_items: int, work: Path) -> Path:
    """The folder with prompts.jsonl and answers.jsonl of one set, as judge.make_items makes it in sandboxes. seeds: of each family."""
    made = []
    for number, config in enumerate(entries.item_configs(seeds, tasks["families"], tasks["level"], num_items)):
        out, task = work / f"{number}", work / f"{number}.json"
        out.mkdir(parents=True)
        task.write_text(entries.task_text("items", config, {"exclude": str(root / entries.EXCLUDED), "out": str(out)}))
        run_entry(root, "items", [str(task)], work)
        made.append(out)
    for name, text in entries.join_items(made).items():
        (work / name).write_text(text, "utf-8")
    return work


def seeds_of(item_set: str, round_name: str, records: Sequence[Record]) -> dict[str, str] | None:
    """Family -> seed of a round's set, of which families whose dev was replaced have another; None while one of them is secret."""
    known = {record["name"]: record["seed"] for record in records if record["event"] == "reveal"}
    planned = next(record["plan"] for record in records if record["event"] == "plan" and record["round"] == round_name)
    basis = [record for record in records if record["event"] == "basis" and record["round"] == round_name][-1]
    repaired = dict(planned["policy"]["repaired"]) if item_set == "dev" else {}
    names = {
        family: f"fresh/{round_name}"
        if item_set == "fresh"
        else f"dev/{repaired[family]}"
        if family in repaired
        else "dev"
        for family in basis["tasks"]["families"]
    }
    return {family: known[name] for family, name in names.items()} if set(names.values()) <= set(known) else None


def differing(one: str, other: str) -> int:
    """Marks that two outcome strings do not share."""
    return sum(a != b for a, b in zip(one, other, strict=False)) + abs(len(one) - len(other))


class Rescoring:
    """One pass over the log; items of a set are made once, completions of a file scored once."""

    def __init__(self, folder: Path, records: Sequence[Record], root: Path, scratch: Path, report: Report) -> None:
        self.folder, self.records, self.root, self.scratch, self.report = folder, records, root, scratch, report
        self.there = check_files.plain_files(folder)
        self.items: dict[tuple[str, str], Path | None] = {}
        self.scored: dict[tuple[str, Path], dict[str, str]] = {}
        self.attempts = [record for record in records if record["event"] == "attempt"]
        self.bases = {record["round"]: record for record in records if record["event"] == "basis"}

    def run(self) -> None:
        self.check_cards()
        since, count, absent = len(self.report.findings), 0, []
        for record in self.records:
            if record["event"] != "outcome" or record["outcome"]["status"] != "completed":
                continue
            for item_set, marks in record["outcome"]["outcomes"].items():
                items = self.items_of(item_set, record["round"])
                path = self.completions_of(record, item_set)
                if items is None:
                    continue
                if path is None or path not in self.there:
                    absent.append(f"{item_set} of {record['round']}/{record['arm']}")
                    continue
                count += 1
                self.compare(record, item_set, marks, items, path)
        if count:
            self.report.checked(f"{count} sets of completions scored again, to the marks in the log", since)
        if absent:
            self.report.unknown(f"{len(absent)} sets have no completions to score again, the first {absent[0]}")

    def items_of(self, item_set: str, round_name: str) -> Path | None:
        """The folder of a set's items; None while its seed is secret, or where they cannot be made."""
        if (item_set, round_name) not in self.items:
            seeds, made = seeds_of(item_set, round_name, self.records), None
            if seeds is not None:
                tasks, work = self.bases[round_name]["tasks"], self.scratch / f"{item_set}-{round_name}"
                try:
                    made = make_items(self.root, seeds, tasks, tasks[f"num_{item_set}_per_family"], work)
                    self.report.verified.append(
                        f"items of {item_set} of {round_name}, made again from the revealed seed"
                    )
                except (PipelineError, subprocess.SubprocessError) as error:
                    self.report.unknown(f"items of {item_set} of {round_name} cannot be made again here: {error}")
            self.items[item_set, round_name] = made
        return self.items[item_set, round_name]

    def completions_of(self, outcome: Record, item_set: str) -> str | None:
        """Path of what an outcome was scored from: of the attempt whose result file it names; of the reference's fresh set the round's own."""
        of_round = [r for r in self.attempts if r["round"] == outcome["round"] and r["arm"] == outcome["arm"]]
        if outcome["arm"] != "reference" or not any(
            f"/{item_set}.jsonl" in path for r in of_round for path in r["files"]
        ):
            digest = outcome["outcome"]["result_digest"]
            of_round = [r for r in self.attempts if digest in r["files"].values()]
        paths = [path for r in of_round for path in r["files"] if path.endswith(f"completions/{item_set}.jsonl")]
        return paths[-1] if paths else None

    def compare(self, record: Record, item_set: str, marks: Mapping[str, str], items: Path, path: str) -> None:
        try:
            found = self.score(path, items)
        except (PipelineError, subprocess.SubprocessError) as error:
            self.report.file(path, f"cannot be scored against the items of the revealed seed: {error}")
            return
        wrong = {family: differing(marks[family], found.get(family, "")) for family in marks}
        if any(wrong.values()):
            told = ", ".join(f"{number} in {family}" for family, number in wrong.items() if number)
            self.report.record(
                record["seq"],
                f"{item_set} of {record['arm']} in {record['round']} is not what {path} scores: {told} marks differ",
            )

    def score(self, path: str, items: Path) -> dict[str, str]:
        """Family -> marks, in item-id order."""
        if (path, items) not in self.scored:
            out = self.scratch / f"scores-{len(self.scored)}.jsonl"
            arguments = [
                "--completions",
                str((self.folder / path).resolve()),
                "--answers",
                str(items / "answers.jsonl"),
                "--out",
                str(out),
            ]
            run_entry(self.root, "score", arguments, self.scratch)
            found: dict[str, str] = {}
            for row in files.rows_of(out):
                mark = "T" if row["truncated"] else "1" if row["correct"] else "0"
                found[row["family"]] = found.get(row["family"], "") + mark
            self.scored[path, items] = found
        return self.scored[path, items]

    def check_cards(self) -> None:
        """No training prompt of a round is an item of its fresh set, or of dev once that is known: digests of the data cards."""
        since, count = len(self.report.findings), 0
        for record in self.attempts:
            cards = [path for path in record["files"] if path.endswith("/data_card.json")]
            for item_set in SETS if record["round"] > "r0000" else ("dev",):
                items = self.items_of(item_set, record["round"])
                for path in cards:
                    if items and path in self.there:
                        count += 1
                        self.hold(path, item_set, items)
        if count:
            self.report.checked(f"{count} times a data card names no item of a judged set", since)

    def hold(self, path: str, item_set: str, items: Path) -> None:
        out = self.scratch / "overlaps.jsonl"
        arguments = [
            "--card",
            str((self.folder / path).resolve()),
            "--prompts",
            str(items / "prompts.jsonl"),
            "--out",
            str(out),
        ]
        try:
            run_entry(self.root, "overlap", arguments, self.scratch)
            named = [row["item_id"] for row in files.rows_of(out)]
        except (PipelineError, subprocess.SubprocessError) as error:
            self.report.file(path, f"cannot be read as a data card: {error}")
            return
        if named:
            self.report.file(path, f"names {len(named)} items of {item_set} as training prompts, {named[0]} first")
