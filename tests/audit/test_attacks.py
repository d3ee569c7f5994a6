"""Test the audit against logs and files made to crash it, to delay it, or to hide something from it. Each once crashed it or passed."""

import json
import os
import random
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main
from pipeline.audit import bundle, check_files, check_plans, examine
from pipeline.audit.findings import Report
from pipeline.campaign import heads
from pipeline.campaign.errors import IntegrityError, PipelineError
from pipeline.campaign.files import tree_digest
from pipeline.campaign.records import Arm, Outcome
from tests.support.logs import LEVELS
from tests.support.sealed import SealedCampaign, gains, played, rechained

Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ours() -> SealedCampaign:
    return played(rounds=2, num_items=20, num_families=2)


@pytest.fixture
def folder(ours: SealedCampaign, tmp_path: Path) -> Path:
    return ours.write(tmp_path / "campaign")


def found(report: Report) -> str:
    return "\n".join(map(str, report.findings))


def signed(ours: SealedCampaign, folder: Path, edit: Callable[[Records], object]) -> Report:
    """Audited after the key's owner changed records and made chain and heads consistent."""
    records = [json.loads(line) for line in ours.lines]
    edit(records)
    (folder / "log.jsonl").write_bytes(b"".join(line + b"\n" for line in rechained(records, ours.key)))
    return examine.examine(folder)


def first(records: Records, event: str) -> dict[str, Any]:
    return next(record for record in records if record["event"] == event)


@pytest.mark.parametrize("event", ["init", "plan", "decision", "overrides"])
def test_what_nests_too_deep_is_a_finding(event: str, ours: SealedCampaign, folder: Path) -> None:
    field = {"init": "facts"}.get(event, event)
    records = [json.loads(line) for line in ours.lines]
    first(records, event)[field]["articles"] = "deep"
    lines = [line.replace(b'"deep"', b"[" * 900 + b"]" * 900) for line in rechained(records, ours.key)]
    at = first(records, event)["seq"]
    (folder / "log.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    assert f"record {at}: is not canonical JSON, or nests deeper" in found(examine.examine(folder))


def test_a_head_of_a_round_that_is_a_list_is_a_finding(ours: SealedCampaign, folder: Path) -> None:
    report = signed(ours, folder, lambda records: first(records, "close").update(round=["r0001"]))
    assert "the signed head does not hold: it has other types" in found(report)


@pytest.mark.parametrize(
    "name", ["hydra/round/r0009.yaml", "rounds/r0001/decisions/99.json", "rounds/r0009", "rounds/r0001/proposals/x"]
)
def test_a_link_in_the_place_of_a_record_is_a_finding(name: str, folder: Path) -> None:
    (folder / name).symlink_to(folder / "rounds" / "r0001")
    assert f"{name}: is a link or not a plain file" in found(examine.examine(folder))


@pytest.mark.timeout(60)
def test_a_fifo_is_not_waited_for(folder: Path) -> None:
    (folder / "campaign.yaml").unlink()
    os.mkfifo(folder / "campaign.yaml")
    os.mkfifo(folder / "hydra" / "round" / "r0009.yaml")
    said = found(examine.examine(folder))
    assert "campaign.yaml: is missing" in said and "r0009.yaml: is a link or not a plain file" in said


def test_overrides_in_a_folder_of_their_own_are_found(folder: Path) -> None:
    (folder / "hydra" / "round" / "more").mkdir()
    (folder / "hydra" / "round" / "more" / "r0009.yaml").write_text("x")
    assert "more/r0009.yaml: is named by no record" in found(examine.examine(folder))


def test_files_that_nobody_looks_at_are_told(folder: Path) -> None:
    (folder / "rounds" / "r0001" / "report.html").write_text("an improvement of 40 %")
    report = examine.examine(folder)
    assert report.ok
    assert any("were not checked" in what and "rounds/r0001/report.html" in what for what in report.not_verifiable)


def test_code_without_a_constitution_is_a_finding(folder: Path, ours: SealedCampaign) -> None:
    report, facts = Report(), dict(ours.records[0]["facts"])
    code = folder / "code" / facts["code_digest"][:16]
    (code / "constitution" / "constitution.yaml").unlink()
    facts["code_digest"] = tree_digest(code)
    code.rename(code.with_name(facts["code_digest"][:16]))
    check_files.check_code(folder, facts, report)
    assert "is not the constitution that was frozen" in found(report)


SIGNED: dict[str, tuple[Callable[[Records], object], str]] = {
    "files elsewhere": (lambda records: first(records, "attempt")["files"].update({"../x.h5": "0" * 64}), "names files outside of the campaign"),
    "file without digest": (lambda records: first(records, "attempt")["files"].update({"x.h5": 5}), "names a file without a digest"),
    "less than nothing": (lambda records: first(records, "attempt").update(gpu_seconds=-9), "attempt has no valid gpu_seconds"),
    "code elsewhere": (lambda records: records[0]["facts"].update(code_digest="../../../.."), "init has no valid code_digest"),
    "target of other caps": (lambda records: records[0]["facts"].update(external="kaggle"), "another external target than the campaign froze"),
    "sent elsewhere": (lambda records: first(records, "submission").update(target="kaggle"), "the submission is for kaggle"),
    "other families": (lambda records: records[0]["facts"].update(families=["a", "b"]), "other families than the campaign froze"),
    "fewer tokens": (lambda records: first(records, "basis").update(tokens_per_arm=1), "something else than the log about tokens_per_arm"),
    "fewer GPUs": (lambda records: first(records, "basis").update(gpus_per_arm=0), "something else than the log about gpus_per_arm"),
    "mode": (lambda records: first(records, "proposal").update(mode="active"), "of another kind or mode"),
    "last score": (lambda records: records.append({"event": "board_score", "number": 1, "score": "9"}), "is '9'"),
    "no number": (lambda records: records.append({"event": "board_score", "number": 99, "score": "0.9"}), "which nobody reserved"),
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNED)
def test_what_the_owner_signed_is_found(name: str, ours: SealedCampaign, folder: Path) -> None:
    edit, said = SIGNED[name]
    assert said in found(signed(ours, folder, edit))


class Rigged(SealedCampaign):
    """One arm's outcome is not what its attempt and its plan say; everything after follows from it."""

    change: Callable[[Outcome], Outcome]

    def filed(self, name: str, arm: Arm) -> Outcome:
        outcome = super().filed(name, arm)
        return type(self).change(outcome) if (name, arm.index) == ("r0001", 2) else outcome


def rigged(change: Callable[[Outcome], Outcome], tmp_path: Path) -> Report:
    kind = type("One", (Rigged,), {"change": staticmethod(change)})
    campaign = kind(gains, levels=dict(list(LEVELS.items())[:2]), num_items=20, campaign="rigged", key=tmp_path / "key")
    campaign.play()
    return examine.examine(campaign.write(tmp_path / "rigged"))


def test_an_arm_that_is_not_scored_on_fresh_items_is_found(tmp_path: Path) -> None:
    report = rigged(lambda outcome: replace(outcome, outcomes={"dev": outcome.outcomes["dev"]}), tmp_path)
    assert "a completed arm has no marks on fresh" in found(report)


def test_an_outcome_of_another_role_is_found(tmp_path: Path) -> None:
    report = rigged(lambda outcome: replace(outcome, role="replicate"), tmp_path)
    assert "the arm was planned as 'axis'" in found(report)


def test_an_arm_that_is_said_to_have_failed_though_it_was_completed_is_told(tmp_path: Path) -> None:
    report = rigged(lambda outcome: replace(outcome, status="failed", exit_class="diverged", outcomes={}), tmp_path)
    assert any("a2 of r0001 has no score (diverged) though" in what for what in report.not_verifiable)


def test_the_same_items_in_two_rounds_are_found(tmp_path: Path) -> None:
    class Same(SealedCampaign):
        def found(self) -> None:
            self.seeds["fresh/r0002"] = self.seeds["fresh/r0001"]
            super().found()

    campaign = Same(gains, levels=dict(list(LEVELS.items())[:2]), num_items=20, campaign="same", key=tmp_path / "key")
    for _ in range(2):
        campaign.play()
    assert "the seed of fresh/r0002 is that of fresh/r0001" in found(examine.examine(campaign.write(tmp_path / "same")))


def test_scores_of_a_board_are_said_to_be_its_word(folder: Path) -> None:
    assert any("scores of the external target are its word" in what for what in examine.examine(folder).not_verifiable)


def test_campaign_yaml_that_says_something_else_is_found(ours: SealedCampaign) -> None:
    facts = {"campaign": "demo", "design": {"rounds": 8}, "commitments": {"fresh/r0001": "0" * 64}, "public_key": "12"}
    honest = f"campaign: demo\ndesign:\n  rounds: 8\ncommitments:\n  fresh/r0001: '{'0' * 64}'\npublic_key: '12'\n"
    report = Report()
    check_files.check_facts(honest.encode(), facts, report)
    assert report.ok, found(report)
    for before, after in (("rounds: 8", "rounds: 9"), ("r0001: '0", "r0001: '1"), ("demo", "other"), ("'12'", "'13'")):
        report = Report()
        check_files.check_facts(honest.replace(before, after).encode(), facts, report)
        assert "campaign.yaml: says something else" in found(report)


def test_the_cost_is_what_the_configuration_multiplies_to() -> None:
    recipe = {"recipe.num_steps": "3", "recipe.batch_size": "4", "recipe.sequence_length": "5"}
    ranks = {f"parallelism.{axis}": "2" for axis in ("tp", "pp", "cp", "dp")}
    assert check_plans.cost_of({**recipe, **ranks}) == {"tokens_per_arm": "60", "gpus_per_arm": "16"}
    assert check_plans.cost_of({**ranks, "cluster.gpus_per_node": "0"})["gpus_per_arm"] == "0"
    assert check_plans.cost_of({**recipe, "recipe.num_steps": "many"}) == {}


def test_a_request_that_nests_too_deep_is_none_of_ours() -> None:
    from pipeline.decision import proposals

    with pytest.raises(IntegrityError, match="A stored request to a proposer is not valid"):
        proposals.reference_of(b"[" * 100_000)


def test_a_bundle_with_any_byte_changed_ends_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    bundle.export(folder, tmp_path / "whole.zip")
    whole, rng, stopped = (tmp_path / "whole.zip").read_bytes(), random.Random(1), 0
    for _ in range(60):
        changed = bytearray(whole)
        changed[rng.randrange(len(changed))] ^= rng.randrange(1, 256)
        (tmp_path / "changed.zip").write_bytes(changed)
        try:
            with bundle.opened(tmp_path / "changed.zip"):
                pass
        except PipelineError:
            stopped += 1
    assert stopped > 30


def test_a_bundle_with_an_entry_without_a_name_is_none(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo(""), b"x")
    assert main(["audit", str(tmp_path / "odd.zip")]) == 4


def test_names_that_are_too_long_are_usage(folder: Path) -> None:
    assert main(["audit", "y" * 5000]) == 2
    assert main(["audit", str(folder), "--anchor", "x" * 5000]) == 2


def test_an_empty_log_is_not_scored_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "log.jsonl").write_bytes(b"")
    assert main(["audit", str(folder), "--rescore"]) == 4
    assert "items and scores were not checked to the end because of the findings" in capsys.readouterr().out


def test_a_name_cannot_move_the_cursor(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "rounds" / "r0001" / "decisions" / "\x1b[1A\x1b[2K9.json").write_text("x")
    open(os.fsencode(folder / "hydra" / "round") + b"/\xff.yaml", "wb").close()
    assert main(["audit", str(folder)]) == 4
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\\x1b[1A" in said and "\\udcff.yaml: is named by no record" in said


def test_an_anchor_of_before_still_holds(ours: SealedCampaign, folder: Path) -> None:
    report = examine.examine(folder, [heads.newest_anchor(ours.lines, ours.campaign)])
    assert report.ok, found(report)
