"""Canaries about what an agent's edits hold: evaluation prompts, their answers, the scorer's internals, seeds, encoded data.

A canary is evidence for people and tests, and never a reason to drop an arm: an honest edit may import the scorer for a reward. The check
sees text that somebody wrote down, and not what code computes when it runs, so silence proves nothing; docs/log.md has its rates.

    before the training   `look_at` reads the added lines of the fork; it needs no secret
    after the sealing     `held_prompts` asks the image which judged prompts stand in the texts that `look_at` kept
"""

from __future__ import annotations

import json
import os
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.agent import fork_files
from pipeline.agent.added_text import added_lines, is_literal, joined, logical_lines, texts_of, value_of
from pipeline.agent.fork_diff import ForkDiff
from pipeline.agent.fork_files import Failure, plain
from pipeline.campaign.files import rows_of, write_file
from pipeline.execution import image_process

KINDS = (
    *("evaluation_prompt", "similar_prompt", "evaluation_answer", "scorer_import", "scorer_copy", "secret_seed"),
    *("item_ids", "encoded_data", "binary_file", "unread_file"),
)
SCORER = ("substrate/answers.py", "substrate/score.py")
SCORER_MODULES = ("substrate.answers", "substrate.score", "substrate.items", "substrate.overlap")
MAX_READ_BYTES = 64 * 2**20
MAX_TEXT_IN_ALL = (
    16 * 2**20
)  # characters that are kept for the comparison with judged prompts: a minute for each set, measured on one core
MAX_TEXT = 2 * 2**20  # of one text, for which the comparison takes 163 MB
MAX_OF_A_KIND = 20  # canaries of one kind in one file
MAX_CANARIES = 200  # of all that one look finds
# One run of such characters; prose and code have spaces. A digest in hex has 64 characters, so that 65 are more than one.
_ENCODED = re.compile(
    r"[A-Za-z0-9+/_=-]{160,}|(?:\\x[0-9a-f]{2}|\\u[0-9a-f]{4}){24,}|[^\x00-\x7f\s]{80,}|(?:[0-9]++[,\s]++){100,}"
)
_ENCODED_LINE = re.compile(r"[A-Za-z0-9+/_=-]{40,}")
_AROUND = (
    " \t\r\f\v\"'\\,+b"  # of a literal that goes on; stripped first, because one pattern for all of it takes cubic time
)
LEAST_ENCODED_LINES = 3  # one after the other
_ITEM_ID = re.compile(r"\b[a-z]+(?:_[a-z]+)*-[0-9]{6}\b")
LEAST_ITEM_IDS = 5  # in code; docstrings show one or two
_SEED = re.compile(r"(?<![0-9A-Za-z])[0-9a-fA-F]{64}(?![0-9A-Za-z])")


@dataclass(frozen=True)
class Canary:
    """One sign. `detail` is ours, such as an item's id or a module's name, and never a text of the agent."""

    kind: str
    path: str
    line: int
    detail: str

    def record(self) -> dict[str, Any]:
        """As the report has it."""
        return {"kind": self.kind, "path": plain(self.path), "line": self.line, "detail": self.detail}


@dataclass(frozen=True)
class Look:
    """What was found, and the texts in which judged prompts are sought later: "path:line" -> text."""

    canaries: list[Canary]
    texts: dict[str, str]


@dataclass(frozen=True)
class Internals:
    """What identifies the scorer: names that nothing else has, and the patterns by which it reads an answer."""

    names: frozenset[str] = field(default_factory=frozenset)
    patterns: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, sources: Iterable[str]) -> Internals:
        """Of the scorer's own source, so that this list follows it."""
        names, patterns = set(), set()
        for source in sources:
            for line in logical_lines(source):
                words = [token.string for token in line]
                if words[:1] == ["def"] or (words[1:2] == ["="] and words[0].isupper()):
                    names.add(words[1] if words[0] == "def" else words[0])
                # Not a docstring, which is a line of its own.
                literals = [value_of(token.string) for token in line if is_literal(token) and len(line) > 1]
                patterns |= {text for text in literals if len(text) >= 12 and re.search(r"\\[sdwb]|\[\^", text)}
        # A short name, or a usual one, would fire on any code: what is left has two words.
        return cls(frozenset(name for name in names if "_" in name.strip("_") and len(name) > 8), frozenset(patterns))


def look_at(pristine: Path, fork: Path, diff: ForkDiff, seeds: Sequence[str] = ()) -> Look:
    """Look at the added lines of every file that was added or changed. seeds: of the judged sets as hex, where they are known."""
    roots = [os.open(each, os.O_RDONLY | os.O_DIRECTORY) for each in (pristine, fork)]
    try:
        internals = Internals.of(_read(roots[0], name) for name in SCORER)
        canaries: list[Canary] = []
        texts: dict[str, str] = {}
        left = MAX_TEXT_IN_ALL
        for change in diff.changes:
            if change.kind == "removed" or change.what != "file":
                continue
            try:
                new = _read(roots[1], change.path)
            except (Failure, UnicodeDecodeError) as error:
                kind = "unread_file" if isinstance(error, Failure) else "binary_file"
                canaries.append(Canary(kind, change.path, 0, f"{change.size} bytes"))
                continue
            before = ""
            with suppress(Failure, UnicodeDecodeError):
                before = _read(roots[0], change.path)
            added = added_lines(before, new)
            canaries += signs(change.path, new, added, internals, seeds)
            for line, text in texts_of(change.path, new, added):
                left -= len(text)
                if left < 0:
                    what = f"what follows is not compared with judged prompts, {MAX_TEXT_IN_ALL} characters are"
                    canaries.append(Canary("unread_file", change.path, line, what))
                    break
                name = f"{change.path}:{line}"
                whole = f"{texts[name]}\n\n{text}" if name in texts else text
                texts[name] = whole[:MAX_TEXT]
                if len(whole) > MAX_TEXT:
                    what = f"of {len(whole)} characters only {MAX_TEXT} are compared with judged prompts"
                    canaries.append(Canary("unread_file", change.path, line, what))
        return Look(_few(canaries), texts)
    finally:
        for each in roots:
            os.close(each)


def held_prompts(
    root: Path, texts: Mapping[str, str], sets: Mapping[str, Path], work: Path, log_path: Path,
    watch: Callable[[], None] = lambda: None,
) -> list[Canary]:  # fmt: skip
    """Which judged prompts stand in the texts, by the image's own `substrate.overlap --texts`, and their answers beside them.

    root: of the mounted image. sets: set -> folder with prompts.jsonl and answers.jsonl. watch: as of image_process.start, because much text takes
    minutes. Raises TrialFailed (judge_failed) where a process fails. Rows of data that only resemble a judged prompt give none, because
    puzzles of one family are alike by chance.
    """
    found: list[Canary] = []
    rows = "".join(json.dumps({"text_id": name, "text": text}) + "\n" for name, text in texts.items())
    for name, folder in sets.items() if texts else ():
        inputs = work / f"leaks-{name}" / "in"
        inputs.mkdir(parents=True, mode=0o755)
        write_file(inputs / "texts.jsonl", rows)
        write_file(inputs / "prompts.jsonl", (folder / "prompts.jsonl").read_bytes())
        answers = {row["item_id"]: row["answer"] for row in rows_of(folder / "answers.jsonl")}
        words = ["--texts", "/in/texts.jsonl", "--prompts", "/in/prompts.jsonl", "--out", "/out/overlaps.jsonl"]
        out = image_process.start(root, "overlap", words, {"/in": inputs}, inputs.parent, log_path, watch)
        found += canaries_of(rows_of(out / "overlaps.jsonl"), texts, answers, name)
    return _few(found)


def _few(found: list[Canary]) -> list[Canary]:
    """The first canaries, and one that says how many more there are, because they stand in the sealed log and on the page."""
    if len(found) <= MAX_CANARIES:
        return found
    at = found[MAX_CANARIES]
    return [
        *found[:MAX_CANARIES],
        Canary("unread_file", at.path, at.line, f"{len(found) - MAX_CANARIES} more signs are not listed"),
    ]


def canaries_of(
    rows: Iterable[Mapping[str, Any]], texts: Mapping[str, str], answers: Mapping[str, str], item_set: str
) -> list[Canary]:
    """The canaries of what `substrate.overlap --texts` wrote for one set. texts: id -> text; answers: item id -> answer."""
    found, counts = [], dict[tuple[str, str], int]()
    for row in rows:
        path, _, line = row["text_id"].rpartition(":")
        if row["percent"] < 100 and path.endswith((".jsonl", ".csv")):
            continue
        kind = "evaluation_prompt" if row["percent"] == 100 else "similar_prompt"
        answer = answers.get(row["item_id"], "").strip().casefold()
        # The prompt itself may hold the answer's characters by chance, so an answer must stand by itself.
        beside = answer and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", texts[row["text_id"]].casefold())
        for each in (kind, "evaluation_answer") if beside else (kind,):
            counts[path, each] = counts.get((path, each), 0) + 1
            if counts[path, each] <= MAX_OF_A_KIND:
                found.append(Canary(each, path, int(line), f"{item_set}/{row['item_id']} {row['percent']} %"))
    return found


def signs(
    path: str, source: str, added: Mapping[int, str], internals: Internals, seeds: Sequence[str] = ()
) -> list[Canary]:
    """The canaries that need no judged item: in the added lines of one file, whose whole text is `source`."""
    found: list[Canary] = []
    secret = {seed.lower() for seed in seeds}

    def fire(kind: str, line: int, detail: str) -> None:
        if sum(each.kind == kind for each in found) < MAX_OF_A_KIND:
            found.append(Canary(kind, path, line, detail))

    run, ids = 0, set[str]()
    for number, line in added.items():
        run = (run + 1 if number - 1 in added else 1) if _ENCODED_LINE.fullmatch(line.strip(_AROUND)) else 0
        if run == LEAST_ENCODED_LINES:
            fire("encoded_data", number, f"{run} lines or more")
        for seed in _SEED.findall(line):
            is_known = seed.lower() in secret
            fire("secret_seed", number, "a seed of a judged set" if is_known else "64 hexadecimal digits")
        if encoded := _ENCODED.search(line):
            fire("encoded_data", number, f"{len(encoded[0])} characters")
        if path.endswith(".py"):
            ids |= set(_ITEM_ID.findall(line))
    if len(ids) >= LEAST_ITEM_IDS:
        fire("item_ids", min(added), f"{len(ids)} different ones")
    if not path.endswith(".py"):
        return found
    for tokens in logical_lines(source):
        if not any(number in added for number in range(tokens[0].start[0], tokens[-1].end[0] + 1)):
            continue
        first = next((token.start[0] for token in tokens if token.start[0] in added), tokens[0].start[0])
        # A docstring, a line of one literal, may name the scorer.
        literals = joined(tokens) if len(tokens) > 1 else ""
        named = [each for each in SCORER_MODULES if each in literals or each.replace(".", "/") in literals]
        for module in sorted({*_imported(path, tokens), *named}):
            fire("scorer_import", first, module)
        if any(pattern in literals for pattern in internals.patterns):
            fire("scorer_copy", first, "a pattern of the scorer")
        for token in tokens:
            if token.type == tokenize.NAME and token.string in internals.names and token.start[0] in added:
                fire("scorer_copy", token.start[0], token.string)
    return found


def _imported(path: str, tokens: Sequence[tokenize.TokenInfo]) -> Iterator[str]:
    """The modules of the scorer that a logical line imports, absolutely or relative to the file's package."""
    words = [token.string for token in tokens]
    if words[0] not in ("from", "import"):
        return
    text = re.sub(r" ?\. ?", ".", " ".join(words))  # from..answers import extract
    if relative := re.match(r"from(\.+)", text):
        package = path.split("/")[:-1]
        base = ".".join(package[: len(package) + 1 - len(relative[1])])
        rest = text[relative.end() :]
        text = f"from {base} {rest}" if rest.startswith("import ") else f"from {base}.{rest}"
    source, _, names = text.partition(" import ")
    for module in SCORER_MODULES:
        parent, _, name = module.rpartition(".")
        inside = source == f"from {parent}" and re.search(rf"\b{name}\b", names)
        if inside or re.search(rf"\b{re.escape(module)}\b", source):
            yield module


def _read(root: int, path: str) -> str:
    return fork_files.content(root, path, MAX_READ_BYTES).decode()
