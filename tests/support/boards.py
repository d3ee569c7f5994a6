"""A campaign with adapters and a client that stands in for Kaggle's: what tests of the board do with them."""

import json
from dataclasses import replace
from pathlib import Path

from pipeline.campaign.layout import Campaign
from pipeline.campaign.log import Log
from pipeline.config import settings
from pipeline.config.schema import External
from pipeline.decision import board_submissions
from pipeline.decision.submission_caps import Caps
from pipeline.execution import adapter
from pipeline.external import board, board_log

CAPS = Caps(per_day=4, per_campaign=10, held_back=2, reference=2)
DAY, NEXT = "2026-11-24", "2026-11-25"
FACTS = {"campaign": "smoke-0a1b2c3d"}
KAGGLE = External(kind="kaggle", submissions=2, rows=10, competition="some-competition", timeout_seconds=30)


def digest_of(campaign: Campaign, arm: str) -> str:
    folder, arm = (campaign.round("r0000"), "a0") if arm == "reference" else (campaign.round("r0001"), arm)
    return adapter.kept_digest(folder.attempts(arm)[0].adapter_dir)


def reserve(
    campaign: Campaign, arm: str = "a1", today: str = DAY, caps: Caps = CAPS, target: str = "kaggle", copy=1
) -> int:
    purpose = "reference" if arm == "reference" else "slot"
    return board_log.reserve(
        campaign, "r0001", arm, purpose, digest_of(campaign, arm), today, caps=caps, target=target, copy=copy
    )


def pack(kept: Path, archive: Path) -> None:
    archive.write_bytes(b"PK" + (kept / adapter.WEIGHTS).read_bytes())


def take(
    campaign: Campaign, external: External = KAGGLE, today: str | None = DAY, caps: Caps = CAPS, **more
) -> list[str]:
    """One meta stage."""
    chosen = replace(settings.load(campaign.round("r0001").config), external=external)
    return board.take_scores(campaign, FACTS, chosen, caps, today=today, pack=pack, **more)


def known(campaign: Campaign) -> tuple[board_submissions.Submission, ...]:
    return board_submissions.submissions_in(Log(campaign.log).records())


def events(campaign: Campaign) -> list[str]:
    return [record["event"] for record in Log(campaign.log).records() if "number" in record]


def show(client: Path, number: int, **columns: str) -> None:
    """What the competition's list says from now on of our so many-th submission there."""
    rows = json.loads((client / "list.json").read_text())
    rows[-number].update({"status": "SubmissionStatus.COMPLETE"} | columns)
    (client / "list.json").write_text(json.dumps(rows))


def num_sent(client: Path) -> int:
    return len(json.loads((client / "list.json").read_text())) if (client / "list.json").exists() else 0


def says(client: Path, act: str, code: int = 1, out: str = "", err: str = "") -> None:
    """What the client prints from now on when it is called to `submit` or for its `submissions`, and its exit code."""
    path = client / "says.json"
    said = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**said, act: {"code": code, "out": out, "err": err}}))


def says_no_more(client: Path) -> None:
    """From now on the client does its work again."""
    (client / "says.json").unlink()
