"""Test rescoring on a small campaign with the real image: items are made again, completions scored again, differing marks found.

Nothing is trained. The completions are written like an arm's, right for as many items as asked.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.audit import examine, rescore
from pipeline.audit.findings import Report
from pipeline.campaign import canonical, files
from pipeline.campaign.errors import ConfigError
from pipeline.campaign.files import read_json, read_json_lines, write_file
from pipeline.campaign.layout import Attempt, Campaign, Round
from pipeline.campaign.log import Log
from pipeline.execution import results
from pipeline.rounds import end_campaign, freeze, meta
from substrate.tasks import FAMILIES
from tests.support.campaigns import OVERRIDES, attributes, fresh_campaign
from tests.support.sealed import rechained

pytestmark = pytest.mark.skipif(shutil.which("unsquashfs") is None, reason="needs unsquashfs")


class Played:
    """One round of a smoke campaign: eight arms and the reference, judged by the image's own scorer."""

    def __init__(self, parent: Path) -> None:
        self.campaign = fresh_campaign(parent)
        self.folder = freeze.freeze(self.campaign, "r0001", OVERRIDES)
        self.scratch = parent / "scratch"
        self.records = Log(self.campaign.log).records()
        with rescore.payload(self.campaign.folder, self.records[0]["facts"], Report()) as root:
            assert root is not None
            self.root = root
            tasks = next(r["tasks"] for r in self.records if r["event"] == "basis")
            seeds = read_json(self.campaign.seeds)
            self.items = {
                name: rescore.make_items(
                    root, dict.fromkeys(tasks["families"], seeds[seed]), tasks, tasks[f"num_{name}_per_family"], self.scratch / name
                )
                for name, seed in (("dev", "dev"), ("fresh", "fresh/r0001"))
            }  # fmt: skip
            first = self.campaign.round("r0000")
            reference = self.judge(first, "a0", ["dev"], 5)
            for number in range(8):
                self.judge(self.folder, f"a{number}", ["dev", "fresh"], 3 + number)
            rows = self.score("fresh", self.completions("fresh", 5), self.folder.meta_dir / "completions")
        reference |= {"round": "r0001", "config_digest": self.folder.frozen_plan().config_digest}
        results.write_result(self.folder.folder / "reference.h5", reference, {"fresh": rows}, [], {})
        meta.close(self.campaign, self.folder)

    def judge(self, of_round: Round, arm: str, sets: list[str], right: int) -> dict[str, Any]:
        """An attempt with completions, a data card, a seal and a result."""
        attempt = of_round.claim_attempt(arm)
        frozen = of_round.frozen_plan()
        planned = next(each for each in frozen.arms if each.name == arm)
        mine = attributes(frozen, planned, runtime_digest=self.records[0]["facts"]["runtime_digest"])
        write_file(attempt.claim, json.dumps({"plan_digest": canonical.digest(frozen.to_json())}))
        write_file(attempt.sealed, json.dumps({"adapter_digest": mine["adapter_digest"], "edited_files": 0}))
        write_file(attempt.data_card, json.dumps({"schema": 1, "prompts": [canonical.digest_text(arm)]}))
        items = {name: self.score(name, self.completions(name, right), attempt.completions_dir) for name in sets}
        results.write_result(attempt.result, mine, items, [], {})
        write_file(of_round.published(arm), attempt.result.read_bytes())
        return mine

    def completions(self, item_set: str, right: int) -> str:
        """The first so many are right, of the others every third was cut."""
        lines = []
        for number, row in enumerate(read_json_lines(self.items[item_set] / "answers.jsonl")):
            answer = row["answer"] if number < right else "none"
            cut = number >= right and number % 3 == 0
            said = {"item_id": row["item_id"], "completion": f"\\boxed{{{answer}}}", "num_tokens": 5, "truncated": cut}
            lines.append(json.dumps(said) + "\n")
        return "".join(lines)

    def score(self, item_set: str, completions: str, folder: Path) -> list[dict[str, Any]]:
        write_file(folder / f"{item_set}.jsonl", completions)
        out = self.scratch / "scores.jsonl"
        answers = self.items[item_set] / "answers.jsonl"
        arguments = ["--completions", str(folder / f"{item_set}.jsonl"), "--answers", str(answers), "--out", str(out)]
        rescore.run_entry(self.root, "score", arguments, self.scratch)
        return read_json_lines(out)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return Played(tmp_path_factory.mktemp("rescore")).campaign


def copied(campaign: Campaign, parent: Path) -> Campaign:
    return Campaign.at(shutil.copytree(campaign.folder, parent / campaign.name))


def rescored(campaign: Campaign) -> Report:
    report = examine.examine(campaign.folder)
    rescore.rescore(campaign.folder, report)
    return report


def said(report: Report) -> str:
    return "\n".join(map(str, report.findings))


def test_completions_score_what_the_log_says(played: Campaign) -> None:
    report = rescored(played)
    assert report.ok, said(report)
    assert "9 sets of completions scored again, to the marks in the log" in report.verified
    assert "8 times a data card names no item of a judged set" in report.verified


def swap(campaign: Campaign, one: str, two: str) -> dict[str, int]:
    """Give two arms each other's outcomes, and derive, file and sign everything after that as the campaign itself would; the number of each
    arm's record. What an operator with the key could do."""
    folder, log = campaign.round("r0001"), Log(campaign.log)
    records = log.records()
    at = {r["arm"]: r for r in records if r["event"] == "outcome"}
    at[one]["outcome"]["outcomes"], at[two]["outcome"]["outcomes"] = (
        at[two]["outcome"]["outcomes"],
        at[one]["outcome"]["outcomes"],
    )
    kept = [r for r in records if r["event"] not in ("evidence", "decision", "overrides", "reveal", "close")]
    log.path.write_bytes(b"".join(line + b"\n" for line in rechained(kept)))
    for path in (*folder.decisions_dir.glob("*.json"), folder.closed, folder.evidence, campaign.overrides("r0002")):
        path.unlink()
    from pipeline.decision import derive

    derived = derive.derive(log.records(), "r0001")
    content = canonical.encoded(rescore_evidence(derived))
    log.append("evidence", round="r0001", sha256=canonical.sha256(content), ledger=files.file_digest(campaign.ledger))
    write_file(folder.evidence, content)
    meta.record_decision(campaign, folder, derived)
    meta.reveal(campaign, folder)
    return {arm: record["seq"] for arm, record in at.items()}


def rescore_evidence(derived: Any) -> dict[str, Any]:

    return derived.evidence.to_json()


def test_swapped_outcomes_are_found_by_their_completions(played: Campaign, tmp_path: Path) -> None:
    campaign = copied(played, tmp_path)
    numbers = swap(campaign, "a2", "a6")
    assert examine.examine(campaign.folder).ok  # hashes, signatures and derivations all hold
    report = rescored(campaign)
    wrong = [finding.record for finding in report.findings]
    assert sorted(wrong) == sorted([numbers["a2"], numbers["a6"]]), said(report)
    assert "fresh of a2 in r0001 is not what rounds/r0001/a2/attempt_00/completions/fresh.jsonl scores" in said(report)


def test_after_the_end_dev_is_scored_again_too(played: Campaign, tmp_path: Path) -> None:
    campaign = copied(played, tmp_path)
    assert end_campaign.end(campaign, dry_run=True) == ["dev", "board"]
    assert end_campaign.end(campaign) == end_campaign.end(campaign) == ["dev", "board"]
    report = rescored(campaign)
    assert report.ok, said(report)
    assert "18 sets of completions scored again, to the marks in the log" in report.verified
    assert not any("secret" in what for what in report.not_verifiable)
    with pytest.raises(ConfigError, match="has ended"):
        freeze.freeze(campaign, "r0002", OVERRIDES)


@pytest.mark.parametrize("is_replaced", [False, True])
def test_dev_items_are_made_again_by_their_slice_until_they_are_replaced(
    played: Campaign, tmp_path: Path, is_replaced: bool
) -> None:
    """What the judge would make, as the next test says, from the log alone."""
    campaign, family = copied(played, tmp_path), "unit_conversion"
    end_campaign.end(campaign)
    records = Log(campaign.log).records()
    for record in records:
        if record["event"] == "basis":
            record["tasks"]["dev_slices"] = {family: {"factor": {"low": "2", "high": "3"}}}
            record["tasks"]["num_dev_per_family"] = 40
        if record["event"] == "plan" and is_replaced:
            record["plan"]["policy"]["repaired"] = [[family, "r0001"]]
    records.append({"event": "reveal", "name": "dev/r0001", "seed": "ab" * 32})
    with rescore.payload(campaign.folder, records[0]["facts"], Report()) as root:
        assert root is not None
        folder = rescore.Rescoring(campaign.folder, records, root, tmp_path / "scratch", Report()).items_of(
            "dev", "r0001"
        )
    assert folder is not None
    assert factors(read_json_lines(folder / "prompts.jsonl"), family) == ({2, 3, 4, 5} if is_replaced else {2, 3})


def factors(prompts: list[dict[str, Any]], family: str) -> set[int]:
    rules = FAMILIES[family]
    return {int(rules.features(rules.parse(row["prompt"]))["factor"][0]) for row in prompts if row["family"] == family}


def test_an_open_campaign_does_not_end(tmp_path: Path) -> None:
    campaign = fresh_campaign(tmp_path)
    with pytest.raises(ConfigError, match="is not closed"):
        end_campaign.end(campaign)


def card_of(campaign: Campaign, arm: str) -> Attempt:
    return campaign.round("r0001").attempts(arm)[0]


def test_a_training_prompt_among_the_items_is_found(played: Campaign, tmp_path: Path) -> None:
    """A card whose digests were not held against this set when it was judged: consistent in the log, and found from the revealed seed."""
    campaign = copied(played, tmp_path)
    records = Log(campaign.log).records()
    with rescore.payload(campaign.folder, records[0]["facts"], Report()) as root:
        assert root is not None
        tasks = next(r["tasks"] for r in records if r["event"] == "basis")
        seeds = dict.fromkeys(tasks["families"], read_json(campaign.seeds)["fresh/r0001"])
        items = rescore.make_items(root, seeds, tasks, 1, tmp_path / "items")
        prompt = read_json_lines(items / "prompts.jsonl")[0]["prompt"]
        code = f"from substrate.overlap import prompt_digest; print(prompt_digest({prompt!r}))"
        import subprocess
        import sys

        done = subprocess.run(
            [sys.executable, "-P", "-c", code], env={"PYTHONPATH": str(root)}, capture_output=True, text=True
        )
    path = card_of(campaign, "a4").data_card
    path.write_text(json.dumps({"schema": 1, "prompts": [done.stdout.strip()]}))
    name = str(path.relative_to(campaign.folder))
    for record in records:
        if record["event"] == "attempt" and name in record["files"]:
            record["files"][name] = files.file_digest(path)
    campaign.log.write_bytes(b"".join(line + b"\n" for line in rechained(records, campaign.signing_key)))
    assert f"{name}: names 1 items of fresh as training prompts" in said(rescored(campaign))


def test_another_image_is_not_run(played: Campaign, tmp_path: Path) -> None:
    campaign = copied(played, tmp_path)
    campaign.image.write_bytes(b"squashed")
    report = rescored(campaign)
    assert "image/substrate.sqsh: does not unpack to the image that was frozen, so nothing of it is run" in said(report)
    campaign.image.unlink()
    assert "items and scores were not made again, because the image is missing" in rescored(campaign).not_verifiable
