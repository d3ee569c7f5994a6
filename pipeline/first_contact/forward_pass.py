"""One forward pass on a node, and its comparison with log-probabilities that another program computed from the same checkpoint.

`run` is the stage: the worker's job runs it from the probe campaign's frozen code. `compare` reads what it wrote.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.campaign import strict_json
from pipeline.campaign.errors import ConfigError, WorkFailed
from pipeline.campaign.facts import facts_of
from pipeline.campaign.files import copy_tree, read_json, rows_of
from pipeline.campaign.layout import Campaign
from pipeline.cluster.site_check import Check
from pipeline.config import corrections
from pipeline.execution import image_process
from pipeline.first_contact.visit import paths_of
from pipeline.sandbox import image, namespace

MOST_APART = {"float32": 0.001, "bfloat16": 0.1}
"""Type of the weights -> the largest mean difference in nats that passes. Another model, or a damaged tensor, is whole nats away.

In float32 ours and transformers differ by .0000015 on the miniature. In bfloat16 rounding flips close choices of a router, so that a model
with random weights differs from itself in float32 by .58; a trained one by far less (docs/first-contact.md)."""
GUESSING = 0.9
"""A model whose loss on English is above this share of a uniform guess's has not learned English."""


def run(probe: Campaign) -> None:
    """Run the forward pass from the pristine image and keep what it wrote. Raises TrialFailed with the end of the log."""
    folder = probe.round("r0000")
    chosen = corrections.of_round(folder)
    rows, answer = paths_of(probe)
    shutil.rmtree(answer, ignore_errors=True)
    folder.logs_dir.mkdir(parents=True, exist_ok=True)  # only a round on this machine has made it
    with namespace.scratch_folder(chosen.cluster.scratch_dir or None, "forward-") as scratch:
        with image.mounted(probe.image, facts_of(probe)["image"]["tree_digest"], scratch) as mount:
            base, bound = image_process.base_of(mount.root, chosen)
            inputs = scratch / "in"
            inputs.mkdir(mode=0o755)
            has_rows = bool(rows_of(rows))
            if has_rows:
                shutil.copyfile(rows, inputs / "rows.jsonl")
            config = {"model": asdict(chosen.model), "parallelism": {"judge_tp": chosen.parallelism.judge_tp}}
            paths = {
                "base": base, "tokenizer": "/substrate/base/tokenizer.json", "rows": "/in/rows.jsonl" if has_rows else None, "out": "/out",
            }  # fmt: skip
            out = image_process.run(
                mount.root, "forward", config, paths, {"/in": inputs, **bound}, scratch / "forward", folder.logs_dir / "forward_image.log",
                chosen=chosen,
            )  # fmt: skip
            copy_tree(out, answer)


def read_stored(path: Path) -> list[dict[str, Any]]:
    """Read log-probabilities that a person stored: JSON lines {"tokens": [ids], "log_probs": [nats]}, one fewer than tokens.

    Raises ConfigError that names the line.
    """
    cure = 'Valid: JSON lines {"tokens": [ids], "log_probs": [nats]}, with log_probs[i] of tokens[i + 1] (docs/first-contact.md makes one)'
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"--log-probs {path} cannot be read: {error.strerror}", cure) from None
    rows = []
    for place, line in enumerate(lines, 1):
        try:
            row = strict_json.read(line)
            tokens, found = row["tokens"], row["log_probs"]
            is_right = len(tokens) == len(found) + 1 >= 2
            is_right = is_right and all(type(each) is int for each in tokens)
            is_right = is_right and all(
                isinstance(each, int | float) and math.isfinite(each) and each <= 0 for each in found
            )
        except (strict_json.BadJson, TypeError, KeyError):
            is_right = False
        if not is_right:
            raise ConfigError(f"line {place} of --log-probs {path} is not such a row: {line[:80]!r}", cure)
        rows.append({"tokens": tokens, "log_probs": found})
    if not rows:
        raise ConfigError(f"--log-probs {path} is empty", cure)
    return rows


def compare(answer: Path, stored: Sequence[Mapping[str, Any]] | None, dtype: str) -> Check:
    """Compare the pass with the stored rows. Without any, say whether the model knows English, which is no proof.

    answer: folder that `run` filled. dtype: of the weights. Raises WorkFailed where the pass wrote other rows than it was asked for.
    """
    if stored is None:
        summary = read_json(answer / "summary.json")
        loss, guess = summary["nats_per_token"], summary["guessing"]
        found = f"{loss:.2f} nats a token on plain English, where a uniform guess has {guess:.2f}; nothing was given to compare with"
        if loss < GUESSING * guess:
            return Check("forward", "good", found)
        return Check(
            "forward", "unknown", f"{found}. The model guesses",
            "If these are published weights, give --log-probs FILE (docs/first-contact.md makes one with transformers) to see where they differ",
        )  # fmt: skip
    ours = [row["log_probs"] for row in rows_of(answer / "log_probs.jsonl")]
    if [len(row) for row in ours] != [len(row["log_probs"]) for row in stored]:
        raise WorkFailed("the forward pass wrote other rows than it was asked for", "Run first-contact with --again")
    apart = [
        (abs(a - b), row, place)
        for row, (mine, theirs) in enumerate(zip(ours, stored, strict=True), 1)
        for place, (a, b) in enumerate(zip(mine, theirs["log_probs"], strict=True))
    ]
    mean = math.fsum(each[0] for each in apart) / len(apart)
    most, row, place = max(apart)
    limit = MOST_APART[dtype]
    found = f"{len(apart)} log-probabilities are {mean:.2g} nats apart in the mean ({most:.2g} at most, line {row}, token {place + 1})"
    if mean <= limit:
        return Check("forward", "good", found)
    return Check(
        "forward", "bad", f"{found}; at most {limit:g} passes for {dtype}",
        "Look whether the stored file is of this checkpoint and this tokenizer (begin token included), then at the gate `checkpoint`",
    )  # fmt: skip
