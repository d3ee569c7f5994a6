"""The local board: score a submission on hidden items, in a process of its own, and print a score with two decimals.

    python -m pipeline board local CAMPAIGN 3        the meta stage or the judge job does this; it prints 0.84 and nothing else

It imitates a leaderboard. It prints one number per submission, from rows that nobody else sees. These come from another distribution
than dev and fresh (`external.shift`, or held-out real rows). Scores have inference noise, because each submission is decoded by sampling
with a seed of its own. Only this process reads the board's seed. It scores only submissions that the sealed log has reserved, checks
their adapters by digest, and gives one number the same score however often it runs.

    vault/board/items/    prompts.jsonl answers.jsonl          made once
    vault/board/0003/     completions.jsonl items.json score.json judge.log      what the score follows from; decoded/ meanwhile
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.campaign import canonical, files
from pipeline.campaign.errors import ConfigError, IntegrityError, NotFound
from pipeline.campaign.facts import facts_of, verified_code
from pipeline.campaign.files import exclusive_lock, read_json, rows_of, write_file
from pipeline.campaign.layout import Campaign
from pipeline.campaign.log import Log
from pipeline.config import settings
from pipeline.decision import board_submissions
from pipeline.execution import judge
from pipeline.external import outbox
from pipeline.sandbox import image
from pipeline.sandbox.entries import ITEM_FILES

SET = "board"


def score(campaign: Campaign, number: int, stop_wanted: Callable[[], bool] = lambda: False) -> str:
    """Return the score of a reserved submission as text, such as "0.84". A killed run resumes, and a finished one is not repeated.

    stop_wanted: polled while decoding, which raises Interrupted once it returns True. The caller has entered a private mount namespace.
    Raises NotFound for a number that is not reserved, ConfigError for one of another target, IntegrityError where adapter, image or an
    earlier score has changed; else as `judge.judge`.
    """
    facts = facts_of(campaign)
    verified_code(campaign, facts)
    submission = reserved(campaign, number)
    chosen = settings.load(campaign.round(submission.round).config)
    campaign.board_dir.mkdir(mode=0o700, exist_ok=True)
    folder = campaign.board_dir / f"{number:04d}"
    with exclusive_lock(campaign.board_dir / ".lock", "submission to the local board"):
        if not (folder / "score.json").exists():
            folder.mkdir(mode=0o700, exist_ok=True)
            make_score(campaign, facts, chosen, submission, folder, stop_wanted)
    stored = read_json(folder / "score.json")
    if (stored["number"], stored["adapter_digest"]) != (number, submission.adapter_digest):
        raise IntegrityError(
            f"{folder}/score.json is of another submission than number {number}", "Compare with a copy"
        )
    return str(stored["score"])


def is_unscored(campaign: Campaign, submission: board_submissions.Submission) -> bool:
    """Whether a submission is for this board and has no score yet, neither in the log nor in the board's folder."""
    is_open = submission.target == "local" and submission.state not in ("scored", "withdrawn")
    return is_open and not (campaign.board_dir / f"{submission.number:04d}" / "score.json").exists()


def reserved(campaign: Campaign, number: int) -> board_submissions.Submission:
    """Return a submission from the sealed log. Raises NotFound where it is not there, ConfigError where it is for another target."""
    known = board_submissions.submissions_in(Log(campaign.log).records())
    if not 1 <= number <= len(known):
        raise NotFound(f"nobody reserved number {number}", f"The log has {len(known)} submissions")
    submission = known[number - 1]
    if submission.target != "local":
        raise ConfigError(
            f"number {number} is for {submission.target}", "The local board scores its own submissions alone"
        )
    return submission


def make_score(
    campaign: Campaign,
    facts: dict[str, Any],
    chosen: settings.Settings,
    submission: board_submissions.Submission,
    folder: Path,
    stop_wanted: Callable[[], bool],
) -> None:
    """Decode and score the hidden items with one adapter, and write the score and what it follows from into `folder`."""
    kept, seed = outbox.adapter_of(campaign, submission), read_json(campaign.seeds)[SET]
    drawn = hmac.new(bytes.fromhex(seed), f"decoding/{submission.number}".encode(), hashlib.sha256).digest()
    sampling = {"temperature": chosen.external.temperature, "seed": int.from_bytes(drawn[:4])}
    log_path = folder / "judge.log"
    with tempfile.TemporaryDirectory(prefix="board-", dir=chosen.cluster.scratch_dir or None) as scratch:
        with image.mounted(campaign.image, facts["image"]["tree_digest"], Path(scratch)) as mount:
            items = hidden_items(campaign, chosen, seed, mount.root, Path(scratch) / "items", log_path)
            judged = judge.judge(
                mount.root, chosen, kept, {}, Path(scratch), log_path,
                decoded_dir=folder / "decoded", stop_wanted=stop_wanted, item_folders={SET: items}, sampling=sampling,
            )  # fmt: skip
    rows = judged.items[SET]
    num_correct = sum(row["correct"] for row in rows)
    write_file(folder / "completions.jsonl", judged.raw[SET], mode=0o600)
    write_file(folder / "items.json", json.dumps(rows), mode=0o600)
    content = {
        "number": submission.number, "adapter_digest": submission.adapter_digest, "score": printed(num_correct, len(rows)), "correct": num_correct,
        "rows": len(rows), "engine": judged.engine, "temperature": str(sampling["temperature"]), "seed": sampling["seed"],
        "items": {name: files.file_digest(items / name) for name in ITEM_FILES},
    }  # fmt: skip
    write_file(folder / "score.json", canonical.encoded(content), mode=0o600)
    shutil.rmtree(folder / "decoded", ignore_errors=True)


def printed(num_correct: int, num_rows: int) -> str:
    """Return the share of correct rows with two decimals, halves rounded up, as a leaderboard shows it."""
    hundredths = (200 * num_correct + num_rows) // (2 * num_rows)
    return f"{hundredths // 100}.{hundredths % 100:02d}"


def hidden_items(
    campaign: Campaign, chosen: settings.Settings, seed: str, root: Path, work: Path, log_path: Path
) -> Path:
    """Return the folder with prompts and answers, made once: generated rows by the board's seed, and its share of the held-out real rows."""
    folder = campaign.board_dir / "items"
    if folder.exists():
        return folder
    parts = [real_rows(campaign, chosen, seed)]
    if chosen.external.generated_rows:
        generated = judge.make_items(root, chosen, SET, seed, work, log_path)
        parts.append({name: rows_of(generated / name) for name in ITEM_FILES})
    aside = Path(tempfile.mkdtemp(prefix=".items.", dir=campaign.board_dir))  # mode 0700
    for name in ITEM_FILES:
        rows = sorted((row for part in parts for row in part[name]), key=lambda row: row["item_id"])
        write_file(aside / name, "".join(json.dumps(row) + "\n" for row in rows), mode=0o600)
    os.rename(aside, folder)
    return folder


def real_rows(campaign: Campaign, chosen: settings.Settings, seed: str) -> dict[str, list[dict[str, Any]]]:
    """Return the held-out real rows that the board's seed picks, by file name. Raises ConfigError where there are too few."""
    wanted = chosen.external.rows - chosen.external.generated_rows
    if not wanted:
        return {name: [] for name in ITEM_FILES}
    rows = {name: rows_of(campaign.held_out_dir / name) for name in ITEM_FILES}
    if len(rows[ITEM_FILES[0]]) < wanted:
        raise ConfigError(
            f"{len(rows[ITEM_FILES[0]])} real rows are held out, the board wants {wanted}",
            "Lower external.rows or external.real_share",
        )

    def place(row: dict[str, Any]) -> bytes:
        return hmac.new(bytes.fromhex(seed), f"real/{row['item_id']}".encode(), hashlib.sha256).digest()

    return {name: sorted(rows[name], key=place)[:wanted] for name in ITEM_FILES}
