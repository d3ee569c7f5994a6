"""Make items again from the revealed seeds, score the completions again and compare the data cards with the items, by the image's own code.

unsquashfs unpacks the image, and its code runs only if its tree digest is the frozen one. The entries `items`, `overlap` and `score` need
the standard library alone. They run without a sandbox, as the user who audits, so read them first (substrate/ in the unpacked image) or
audit on a machine where nothing can be harmed. Without the image or unsquashfs nothing runs, and the report says so.
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
    """Score every outcome again whose seed is revealed and whose completions exist. `audit.examine` has read the campaign before."""
    records = records_of(folder)
    with payload(folder, records[0]["facts"], report) as root:
        if root is not None:
            with tempfile.TemporaryDirectory(prefix="rescore-") as scratch:
                Rescoring(folder, records, root, Path(scratch), report).run()


def records_of(folder: Path) -> list[dict[str, Any]]:
    """The complete records of the log, whether or not their chain holds. Raises ValueError for a line that is not strict JSON."""
    lines = (folder / "log.jsonl").read_bytes().split(b"\n")[:-1]
    return [strict_json.read(line, numbers=strict_json.Numbers.WHOLE) for line in lines]


@contextmanager
def payload(folder: Path, facts: Mapping[str, Any], report: Report) -> Iterator[Path | None]:
    """A context that gives the folder of the unpacked image, or None and a line in `report` if it is missing or not the frozen one."""
    sqsh = folder / "image" / "substrate.sqsh"
    if not sqsh.is_file() or shutil.which("unsquashfs") is None:
        what = "the image" if not sqsh.is_file() else "unsquashfs (squashfs-tools)"
        report.unknown(f"items and scores were not made again, because {what} is missing")
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="payload-") as scratch:
        root = Path(scratch, "payload")
        try:
            run_program("unsquashfs", "-quiet", "-no-progress", "-no-xattrs", "-dest", str(root), str(sqsh))
            digest = files.tree_digest(root)
        except (PipelineError, OSError) as error:
            digest = f"unreadable ({error})"
        if digest != facts["image"]["tree_digest"]:
            report.file("image/substrate.sqsh", "does not unpack to the image that was frozen, so nothing of it is run")
            yield None
            return
        report.verified.append("the image's tree digest")
        yield root


def run_entry(root: Path, entry: str, arguments: Sequence[str], work: Path) -> None:
    """Run one of the image's entries. Raises IntegrityError with the end of its stderr if it fails."""
    done = entries.run(root, entry, arguments, work, MOST_SECONDS)
    if done.returncode:
        raise IntegrityError(f"substrate.{entry} ended with {done.returncode}: {' '.join(done.stderr.split()[-30:])}")


def make_items(
    root: Path,
    seeds: Mapping[str, str],
    tasks: Mapping[str, Any],
    num_items: int,
    work: Path,
    slices: Mapping[str, Any] | None = None,
) -> Path:
    """Make the items of one set, as judge.make_items does in sandboxes. Returns `work`, with prompts.jsonl and answers.jsonl.

    seeds: family -> seed. tasks: families and level. num_items: of each family. slices: declared limits of dev's families.
    """
    folders = []
    for number, config in enumerate(
        entries.item_configs(seeds, tasks["families"], tasks["level"], num_items, slices=slices)
    ):
        out, task = work / f"{number}", work / f"{number}.json"
        out.mkdir(parents=True)
        task.write_text(entries.task_text("items", config, {"exclude": str(root / entries.EXCLUDED), "out": str(out)}))
        run_entry(root, "items", [str(task)], work)
        folders.append(out)
    for name, text in entries.join_items(folders).items():
        (work / name).write_text(text, "utf-8")
    return work


def seeds_of(item_set: str, round_name: str, records: Sequence[Record]) -> dict[str, str] | None:
    """Family -> seed of a round's set; None while one of the seeds is secret. A family whose dev was replaced has a seed of its own."""
    known = {record["name"]: record["seed"] for record in records if record["event"] == "reveal"}
    basis = [record for record in records if record["event"] == "basis" and record["round"] == round_name][-1]
    repaired = replaced_dev(round_name, records) if item_set == "dev" else {}
    names = {
        family: f"fresh/{round_name}"
        if item_set == "fresh"
        else f"dev/{repaired[family]}"
        if family in repaired
        else "dev"
        for family in basis["tasks"]["families"]
    }
    return {family: known[name] for family, name in names.items()} if set(names.values()) <= set(known) else None


def replaced_dev(round_name: str, records: Sequence[Record]) -> dict[str, str]:
    """The families whose dev items were replaced by then, each with the round that had the new ones first."""
    planned = next(record["plan"] for record in records if record["event"] == "plan" and record["round"] == round_name)
    return dict(planned["policy"]["repaired"])


def numbers_of(slices: Mapping[str, Any]) -> dict[str, Any]:
    """The declared slices of a sealed basis, whose numbers are text there, as the image takes them."""
    return {
        family: {feature: {end: float(text) for end, text in ends.items()} for feature, ends in limits.items()}
        for family, limits in slices.items()
    }


def differing(one: str, other: str) -> int:
    """How many marks differ between two outcome strings."""
    return sum(a != b for a, b in zip(one, other, strict=False)) + abs(len(one) - len(other))


class Rescoring:
    """One pass over the log, which makes the items of each set once and scores each file of completions once."""

    def __init__(self, folder: Path, records: Sequence[Record], root: Path, scratch: Path, report: Report) -> None:
        self.folder, self.records, self.root, self.scratch, self.report = folder, records, root, scratch, report
        self.there = check_files.plain_files(folder)
        self.items: dict[tuple[str, str], Path | None] = {}
        self.scored: dict[tuple[str, Path], dict[str, str]] = {}
        self.attempts = [record for record in records if record["event"] == "attempt"]
        self.bases = {record["round"]: record for record in records if record["event"] == "basis"}

    def run(self) -> None:
        """Check the data cards and every completed outcome, and report what was found."""
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
        """The folder of a set's items; None while its seed is secret, or if they cannot be made here."""
        if (item_set, round_name) not in self.items:
            seeds, folder = seeds_of(item_set, round_name, self.records), None
            if seeds is not None:
                tasks, work = self.bases[round_name]["tasks"], self.scratch / f"{item_set}-{round_name}"
                of_dev = entries.dev_slices(numbers_of(tasks["dev_slices"]), replaced_dev(round_name, self.records))
                slices, num_items = of_dev if item_set == "dev" else {}, tasks[f"num_{item_set}_per_family"]
                try:
                    folder = make_items(self.root, seeds, tasks, num_items, work, slices)
                    self.report.verified.append(
                        f"items of {item_set} of {round_name}, made again from the revealed seed"
                    )
                except (PipelineError, subprocess.SubprocessError) as error:
                    self.report.unknown(f"items of {item_set} of {round_name} cannot be made again here: {error}")
            self.items[item_set, round_name] = folder
        return self.items[item_set, round_name]

    def completions_of(self, outcome: Record, item_set: str) -> str | None:
        """The path of the completions that an outcome was scored from; None if no record names them.

        They belong to the attempt whose result file the outcome names. The reference's fresh completions belong to the round itself.
        """
        of_round = [r for r in self.attempts if r["round"] == outcome["round"] and r["arm"] == outcome["arm"]]
        if outcome["arm"] != "reference" or not any(
            f"/{item_set}.jsonl" in path for r in of_round for path in r["files"]
        ):
            digest = outcome["outcome"]["result_digest"]
            of_round = [r for r in self.attempts if digest in r["files"].values()]
        paths = [path for r in of_round for path in r["files"] if path.endswith(f"completions/{item_set}.jsonl")]
        return paths[-1] if paths else None

    def compare(self, record: Record, item_set: str, marks: Mapping[str, str], items: Path, path: str) -> None:
        """Score the completions at `path` and compare them with the outcome strings in the log. marks: family -> outcome string."""
        try:
            scored = self.score(path, items)
        except (PipelineError, subprocess.SubprocessError) as error:
            self.report.file(path, f"cannot be scored against the items of the revealed seed: {error}")
            return
        wrong = {family: differing(marks[family], scored.get(family, "")) for family in marks}
        if any(wrong.values()):
            counts = ", ".join(f"{number} in {family}" for family, number in wrong.items() if number)
            self.report.record(
                record["seq"],
                f"{item_set} of {record['arm']} in {record['round']} is not what {path} scores; marks that differ: {counts}",
            )

    def score(self, path: str, items: Path) -> dict[str, str]:
        """Family -> outcome string, in item-id order."""
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
            marks: dict[str, str] = {}
            for row in files.rows_of(out):
                mark = "T" if row["truncated"] else "1" if row["correct"] else "0"
                marks[row["family"]] = marks.get(row["family"], "") + mark
            self.scored[path, items] = marks
        return self.scored[path, items]

    def check_cards(self) -> None:
        """Check by the digests in the data cards that no training prompt is an item of the round's fresh set, or of dev once revealed."""
        since, count = len(self.report.findings), 0
        for record in self.attempts:
            cards = [path for path in record["files"] if path.endswith("/data_card.json")]
            for item_set in SETS if record["round"] > "r0000" else ("dev",):
                items = self.items_of(item_set, record["round"])
                for path in cards:
                    if items and path in self.there:
                        count += 1
                        self.check_card(path, item_set, items)
        if count:
            self.report.checked(f"{count} times a data card names no item of a judged set", since)

    def check_card(self, path: str, item_set: str, items: Path) -> None:
        """Report a data card that cannot be read, or that names an item of the set as a training prompt."""
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
            overlaps = [row["item_id"] for row in files.rows_of(out)]
        except (PipelineError, subprocess.SubprocessError) as error:
            self.report.file(path, f"cannot be read as a data card: {error}")
            return
        if overlaps:
            self.report.file(
                path, f"names {len(overlaps)} items of {item_set} as training prompts, {overlaps[0]} first"
            )
