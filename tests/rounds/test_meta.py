"""Test the meta stage on published arm files: every mixture decides or says why not, and running it again repairs any crash."""

import fcntl
import os
import shutil
from pathlib import Path

import h5py
import pytest

from pipeline.campaign import files, heads, keys
from pipeline.campaign.errors import ConfigError, IntegrityError
from pipeline.campaign.facts import facts_of
from pipeline.campaign.files import read_json
from pipeline.campaign.layout import Campaign, Round
from pipeline.campaign.log import Log
from pipeline.execution import results
from pipeline.rounds import freeze, meta
from pipeline.rounds.freeze import write_overrides
from tests.support.campaigns import attributes, frozen_campaign, publish, publish_reference, scored, tree

BEST = "a2"


@pytest.fixture
def campaign(tmp_path) -> Campaign:
    return frozen_campaign(tmp_path)


@pytest.fixture
def folder(campaign) -> Round:
    return campaign.round("r0001")


def publish_all(folder: Round, *but: str) -> None:
    """Eight arms of which a2 is far above the reference; those in `but` are left out."""
    for number in range(8):
        if f"a{number}" not in but:
            publish(folder, f"a{number}", 38 if f"a{number}" == BEST else 20)


def exit_classes(folder: Round) -> dict[str, str]:
    return {found["arm"]: found["exit_class"] for found in read_json(folder.evidence)["outcomes"]}


def test_eight_files_make_a_decision_and_the_next_overrides(campaign, folder):
    publish_all(folder)
    decision = meta.close(campaign, folder)
    moved = folder.frozen_plan().arms[2].overrides
    assert (decision.state, decision.kept, decision.policy.standing) == ("decided", BEST, moved)
    assert [path.name for path in folder.decisions_dir.iterdir()] == ["00.json"]
    assert read_json(folder.decisions_dir / "00.json")["evidence_digest"] == files.file_digest(folder.evidence)

    following = freeze.freeze(campaign, "r0002", [])
    arms = following.frozen_plan().arms
    assert all(setting in arm.overrides or arm.axis == "lora_rank" for arm in arms[1:] for setting in moved)
    assert (arms[0].overrides, arms[7].overrides, arms[7].replicate_of) == ((), moved, "standing")


def test_closing_reveals_the_seed_and_signs_the_log(campaign, folder):
    publish_all(folder)
    meta.close(campaign, folder)
    closed, facts = read_json(folder.closed), facts_of(campaign)
    assert keys.commitment("fresh/r0001", closed["fresh_seed"]) == facts["commitments"]["fresh/r0001"]
    head = heads.Head(*(closed[name] for name in ("campaign", "round", "number", "first", "last", "head", "root")))
    assert keys.signature_holds(facts["public_key"], head.message, closed["signature"])
    log = Log(campaign.log)
    assert heads.anchors_in(closed["anchor"]) == [heads.Anchor(facts["campaign"], closed["seq"], log.head())]
    events = [record["event"] for record in log.records()]
    planned = ["init", "basis", "plan", "basis", "plan", "attempt"]
    assert events == [*planned, *["outcome"] * 9, "evidence", "decision", "overrides", "reveal", "close"]
    meta.close(campaign, folder)
    assert len(log.records()) == len(events)


def test_the_ledger_has_every_readable_file(campaign, folder):
    publish_all(folder, "a5")
    folder.published("a4").write_bytes(b"damaged")
    meta.close(campaign, folder)
    with h5py.File(campaign.ledger) as ledger:
        assert set(ledger["r0001"]) == {"a0", "a1", "a2", "a3", "a6", "a7", "reference"}
        assert set(ledger["r0000"]) == {"a0"}


def test_running_again_changes_no_byte(campaign, folder):
    publish_all(folder, "a6")
    publish(folder, "a1", None)
    meta.close(campaign, folder)
    before = tree(campaign.folder)
    meta.close(campaign, folder)
    assert tree(campaign.folder) == before


@pytest.mark.parametrize("num_bytes", [0, 1, 100, 3000, -1])
def test_a_truncated_file_has_no_score_and_stops_nobody(campaign, folder, num_bytes):
    publish_all(folder)
    path = folder.published("a3")
    path.write_bytes(path.read_bytes()[:num_bytes])
    decision = meta.close(campaign, folder)
    assert (decision.state, decision.kept) == ("decided", BEST)
    assert exit_classes(folder)["a3"] == "integrity: not a readable result file"
    assert "a3 has no score: failed (integrity: not a readable result file)" in decision.reasons


@pytest.mark.parametrize("name", ["campaign", "round", "arm", "image_digest", "constitution_digest", "config_digest"])
def test_a_file_of_another_plan_has_no_score(campaign, folder, name):
    publish_all(folder)
    publish(folder, BEST, 38, **{name: "another"})
    decision = meta.close(campaign, folder)
    assert (decision.state, decision.kept) == ("decided", None)
    assert exit_classes(folder)[BEST] == f"integrity: made for another plan, {name} differ"


def test_one_arms_file_under_another_name_does_not_count_twice(campaign, folder):
    publish_all(folder, "a3")
    folder.published("a3").write_bytes(folder.published(BEST).read_bytes())
    meta.close(campaign, folder)
    assert exit_classes(folder)["a3"] == "integrity: made for another plan, arm differ"


def test_absent_failed_and_killed_arms_are_told_apart(campaign, folder):
    publish_all(folder, "a4", "a5")
    publish(folder, "a6", None)
    folder.claim_attempt("a5")
    decision = meta.close(campaign, folder)
    found = exit_classes(folder)
    assert (found["a4"], found["a5"], found["a6"]) == ("never_started", "unfinished", "diverged")
    assert (decision.state, decision.kept) == ("decided", BEST)


def test_below_the_quorum_there_is_evidence_and_nothing_else(campaign, folder):
    publish_all(folder, "a0", "a1", "a3", "a4")
    before = tree(campaign.folder)
    decision = meta.close(campaign, folder)
    assert (decision.state, decision.policy.standing) == ("undecided", ())
    assert decision.reasons[0].startswith("article 3: 4 of 8 arms have a score, 5 are needed; missing: a0 absent")
    new = tree(campaign.folder).keys() - before.keys()
    assert new == {"ledger.h5", "rounds/r0001/evidence.json"}
    events = {record["event"] for record in Log(campaign.log).records()}
    assert events == {"init", "basis", "plan", "attempt", "outcome", "evidence"}

    publish(folder, "a0", 20)  # the fifth arm makes the quorum, and the round goes on
    assert meta.close(campaign, folder).state == "decided"


def test_without_the_reference_nothing_is_decided(campaign, folder):
    publish_all(folder)
    campaign.round("r0000").published("a0").unlink()
    decision = meta.close(campaign, folder)
    assert (decision.state, decision.reasons[0]) == (
        "undecided",
        "article 7: the reference recipe has no score on this round's fresh items",
    )
    assert not folder.closed.exists()


def test_a_late_arm_adds_a_decision_and_replaces_overrides_while_no_round_rests_on_them(campaign, folder):
    publish_all(folder, BEST)
    assert meta.close(campaign, folder).kept is None
    first = (folder.decisions_dir / "00.json").read_bytes()
    closed = read_json(folder.closed)
    publish(folder, BEST, 38)
    assert meta.close(campaign, folder).kept == BEST
    assert sorted(path.name for path in folder.decisions_dir.iterdir()) == ["00.json", "01.json"]
    assert (folder.decisions_dir / "00.json").read_bytes() == first
    again = read_json(folder.closed)
    assert (again["fresh_seed"], again["number"]) == (
        closed["fresh_seed"],
        closed["number"] + 1,
    )  # the head is signed again
    late = [record["arm"] for record in Log(campaign.log).records() if record["event"] == "late_arm"]
    assert late == [BEST]
    assert "lora.rank" in campaign.overrides("r0002").read_text()


def test_a_late_arm_never_changes_overrides_that_a_round_was_planned_with(campaign, folder):
    publish_all(folder, BEST)
    meta.close(campaign, folder)
    following = freeze.freeze(campaign, "r0002", [])
    before = tree(following.folder) | {"overrides": campaign.overrides("r0002").read_bytes()}
    publish(folder, BEST, 38)
    assert meta.close(campaign, folder).kept == BEST
    assert (folder.decisions_dir / "01.json").exists()
    assert tree(following.folder) | {"overrides": campaign.overrides("r0002").read_bytes()} == before


class Crash(BaseException):
    """The machine goes down."""


def test_after_a_crash_at_any_write_running_again_gives_the_same_bytes(campaign, folder, tmp_path, monkeypatch):
    publish_all(folder, "a1", "a5", "a6")  # the fewest arms that decide
    whole = Campaign.at(shutil.copytree(campaign.folder, tmp_path / "whole"))
    untouched = tree(whole.folder)
    meta.close(whole, whole.round("r0001"))
    expected = tree(whole.folder)

    sync = os.fsync
    num_crashes = 0
    for allowed in range(0, 100, 3):
        for name in tree(campaign.folder).keys() - untouched.keys():
            (campaign.folder / name).unlink()
        for name, content in untouched.items():
            (campaign.folder / name).write_bytes(content)
        calls = iter(range(100))

        def crash(handle: int, calls=calls, allowed=allowed) -> None:
            if next(calls) == allowed:
                raise Crash
            sync(handle)

        monkeypatch.setattr(os, "fsync", crash)
        try:
            meta.close(campaign, folder)
            break
        except Crash:
            num_crashes += 1
        finally:
            monkeypatch.setattr(os, "fsync", sync)
        meta.close(campaign, folder)
        assert tree(campaign.folder) == expected
    assert num_crashes >= 6


def test_records_hold_no_host_path_or_folder(campaign, folder, tmp_path):
    publish_all(folder)
    folder.published("a3").write_bytes(b"damaged")
    meta.close(campaign, folder)
    records = [
        folder.evidence,
        *folder.decisions_dir.iterdir(),
        campaign.overrides("r0002"),
        folder.closed,
        campaign.log,
    ]
    for path in records:
        text = path.read_text()
        assert str(tmp_path) not in text
        assert os.uname().nodename not in text or len(os.uname().nodename) < 4


@pytest.mark.parametrize("fault", ["another adapter", "another round", "damaged"])
def test_a_reference_that_does_not_belong_is_refused(campaign, folder, fault):
    publish_all(folder)
    path = folder.folder / "reference.h5"
    first = campaign.round("r0000").frozen_plan()
    if fault == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        changes = {"adapter_digest": "another"} if fault == "another adapter" else {"round": "r0007"}
        results.write_result(
            path, attributes(first, first.arms[0], **{"round": "r0001", **changes}), {"fresh": scored(20)}, [], {}
        )
    with pytest.raises(IntegrityError, match="reference.h5"):
        meta.close(campaign, folder)
    assert not folder.decisions_dir.exists()


def test_a_changed_plan_is_refused_before_anything_is_written(campaign, folder):
    publish_all(folder)
    folder.plan.write_text(folder.plan.read_text().replace('"role":"axis"', '"role":"anchor"', 1))
    before = tree(campaign.folder)
    with pytest.raises(IntegrityError, match="plan.json differs from the plan of r0001 in log.jsonl"):
        meta.close(campaign, folder)
    assert tree(campaign.folder) == before


def test_two_meta_stages_do_not_run_at_once(campaign, folder):
    publish_all(folder)
    with open(folder.folder / ".meta.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another meta stage of r0001 runs now"):
            meta.close(campaign, folder)
    assert meta.close(campaign, folder).state == "decided"


def test_after_the_last_budgeted_round_there_are_no_more_overrides(campaign):
    write_overrides(campaign, "r0008", {"round": "r0008"})
    last = freeze.freeze(campaign, "r0008", [])
    publish_reference(campaign, last)
    publish_all(last)
    assert meta.close(campaign, last).state == "decided"
    assert last.closed.exists()
    assert not Path(campaign.overrides("r0009")).exists()
