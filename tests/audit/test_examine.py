"""Test the audit: an honest campaign has no findings, and every tampering is found and named."""

import json
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main
from pipeline.audit import bundle, examine
from pipeline.audit.findings import Report
from pipeline.campaign import canonical, heads
from pipeline.campaign.errors import IntegrityError
from pipeline.campaign.files import file_digest
from pipeline.campaign.log import Log
from pipeline.campaign.records import Decision
from pipeline.config import settings
from pipeline.decision import derive, policy_update
from tests.support import tampering
from tests.support.paths import ROOT
from tests.support.sealed import RULES, SealedCampaign, gains, played, rechained

NOT_NEEDED = (
    "torch",
    "numpy",
    "scipy",
    "h5py",
    "omegaconf",
    "hydra",
    "yaml",
    "rich",
    "submitit",
    "rfc8785",
    "optuna",
    "megatron",
    "nemo",
)
KNOWN: dict[tuple[str, str], derive.Derived] = {}


@pytest.fixture(scope="module")
def ours() -> SealedCampaign:
    return played()


@pytest.fixture(scope="module")
def folder(ours: SealedCampaign, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untouched campaign; whoever changes it puts it back."""
    return ours.write(tmp_path_factory.mktemp("campaigns") / "finished")


def anchor_of(campaign: SealedCampaign, seq: int = -1) -> heads.Anchor:
    lines = campaign.lines if seq < 0 else campaign.lines[: seq + 1]
    return heads.newest_anchor(lines, campaign.campaign)


def examined(folder: Path, *anchors: heads.Anchor) -> Report:
    return examine.examine(folder, anchors, KNOWN)


def found(report: Report) -> str:
    return "\n".join(map(str, report.findings))


def test_nothing_is_found_in_an_honest_campaign(folder: Path, ours: SealedCampaign) -> None:
    report = examined(folder, anchor_of(ours))
    assert report.ok, found(report)
    assert len(report.verified) == 15
    assert report.to_json()["ok"] is True
    assert not any("anchor is given" in what for what in report.not_verifiable)


def write(change: tampering.Change, ours: SealedCampaign, folder: Path) -> Iterator[None]:
    """Put a change there, and back again."""
    (folder / "log.jsonl").write_bytes(b"".join(line + b"\n" for line in change.lines) + change.torn)
    for name, content in change.files.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    yield
    ours_files: dict[str, bytes] = {**ours.files, "log.jsonl": b"".join(line + b"\n" for line in ours.lines)}
    for name in ("log.jsonl", *change.files):
        if name in ours_files:
            (folder / name).write_bytes(ours_files[name])
        else:
            (folder / name).unlink()


def tamper(kind: str, number: int, ours: SealedCampaign, folder: Path) -> None:
    """One change must be found, and named; a log cut back to a head by whoever knows it from elsewhere."""
    change = tampering.KINDS[kind](random.Random(f"{kind}/{number}"), ours, played(campaign="sealed-0002"))
    for _ in write(change, ours, folder):
        report = examined(folder)
        if change.cut:
            assert report.ok, f"{kind} {number}: {found(report)}"
            assert any("cut it back to an earlier signed head" in what for what in report.not_verifiable)
            report = examined(folder, anchor_of(ours))
        assert report.findings, f"{kind} {number} was not found"
        assert all(finding.record is not None or finding.file for finding in report.findings)


@pytest.mark.parametrize("kind", tampering.KINDS)
def test_tampering_is_found_and_named(kind: str, ours: SealedCampaign, folder: Path) -> None:
    for number in range(12):
        tamper(kind, number, ours, folder)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", tampering.KINDS)
def test_many_more_tamperings_are_found_and_named(kind: str, ours: SealedCampaign, folder: Path) -> None:
    wanted = int(os.environ.get("TAMPERINGS", "400"))  # of all kinds; two thousand by hand (CONTRIBUTING.md)
    for number in range(12, 12 + wanted // len(tampering.KINDS) + 1):
        tamper(kind, number, ours, folder)


def test_a_log_cut_back_is_found_by_the_close_record_of_a_later_round(ours: SealedCampaign, folder: Path) -> None:
    change = tampering.cut_to_a_head(random.Random(1), ours, ours)
    change.files.pop("rounds/r0004/closed.json")
    for _ in write(change, ours, folder):
        report = examined(folder)
        assert "rounds/r0004/closed.json: is named by no record of the log" in found(report)


def test_an_anchor_of_any_record_is_enough(ours: SealedCampaign, folder: Path, tmp_path: Path) -> None:
    for seq in (0, 57, len(ours.lines) - 1):
        assert examined(folder, anchor_of(ours, seq)).ok
    wrong = replace(anchor_of(ours, 57), head="0" * 64)
    assert "record 57: is not the record that the anchor has" in found(examined(folder, wrong))
    other = played(campaign="sealed-0002")
    assert "is the log of sealed-0001, and an anchor of sealed-0002" in found(examined(folder, anchor_of(other, 3)))


def test_anchors_are_read_out_of_any_text(ours: SealedCampaign) -> None:
    anchor = anchor_of(ours, 57)
    note = f"Notes:\n    {anchor}\nComment={anchor} x"
    assert heads.anchors_in(note) == [anchor, anchor]
    assert heads.anchors_in("postrain-log/a/1/zz") == []


def test_whoever_has_the_key_can_rewrite_what_no_anchor_holds(ours: SealedCampaign, tmp_path: Path) -> None:
    """The limit that docs/seal.md names: only an anchor tells."""
    records = [json.loads(line) for line in ours.lines]
    reserved = next(record for record in records if record["event"] == "board_score")
    other = {**reserved, "note": "typed later"}
    lines = rechained([other if record is reserved else record for record in records], ours.key)
    copy = ours.write(tmp_path / "copy")
    (copy / "log.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    for record in map(json.loads, lines):
        if record["event"] == "close":
            anchor = heads.newest_anchor(lines[: record["seq"] + 1], ours.campaign)
            seed = ours.seeds[f"fresh/{record['round']}"]
            content = canonical.encoded({"fresh_seed": seed, **record, "anchor": str(anchor)})
            (copy / f"rounds/{record['round']}/closed.json").write_bytes(content)
    assert examine.examine(copy).ok
    assert f"record {reserved['seq']}: is not" in found(examine.examine(copy, [anchor_of(ours, reserved["seq"])]))
    assert "history was rewritten" in found(examine.examine(copy, [anchor_of(ours)]))


@dataclass
class Rigged(SealedCampaign):
    """Signed with the real key, files and hashes in order; what is decided is what somebody wished."""

    def decision(self, derived: derive.Derived) -> Decision:
        decision = derived.decision
        if decision.round != "r0002":
            return decision
        moved = ("recipe.lora.alpha", "64")
        policy = replace(decision.policy, standing=(*decision.policy.standing, moved))
        return replace(decision, kept="a4", policy=policy)


@pytest.fixture
def rigged(tmp_path: Path) -> SealedCampaign:
    levels = {"roman": 0.8, "text_cipher": 0.7}
    return Rigged(gains, levels=levels, num_items=30, campaign="rigged", key=tmp_path / "key")


def test_a_rigged_decision_is_caught_by_deriving_it_again(rigged: SealedCampaign, tmp_path: Path) -> None:
    for _ in range(3):
        rigged.play()
    report = examine.examine(rigged.write(tmp_path / "rigged"), [anchor_of(rigged)])
    at = next(r["seq"] for r in rigged.records if r["event"] == "decision" and r["round"] == "r0002")
    assert found(report).splitlines() == [
        f"record {at}: the decision of r0002 does not follow from its evidence",
        f"record {at + 1}: the overrides of r0003 do not follow from the decision before them",
    ]


def resealed(campaign: SealedCampaign, folder: Path, edit: Any) -> Report:
    """Records changed by whoever has the key, with chain, heads and the files that records hold made consistent."""
    records = [json.loads(line) for line in campaign.lines]
    for record in records:
        edit(record)
        if record["event"] == "plan":
            record["plan_digest"] = canonical.sha256(canonical.encoded(record["plan"]))
    digests = {record["round"]: record["plan_digest"] for record in records if record["event"] == "plan"}
    for record in records:
        if record.get("plan_digest"):
            record["plan_digest"] = digests[record["round"]]
    campaign.write(folder)
    lines = rechained(records, campaign.key)
    (folder / "log.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    return examine.examine(folder)


def rig_articles(record: dict[str, Any]) -> None:
    if record["event"] == "init":
        record["facts"]["articles"]["7"]["z"] = "0.01"


def rig_critical(record: dict[str, Any]) -> None:
    if record["event"] == "init":
        record["facts"]["critical"]["gap_level"] = "0.5"


def rig_confirmation(record: dict[str, Any]) -> None:
    if record["event"] == "init":
        record["facts"]["confirmation"] = "doubled"


def rig_choice(record: dict[str, Any]) -> None:
    if record["event"] == "init":
        record["facts"]["choice"] = "max_dev"


def rig_slice(record: dict[str, Any]) -> None:
    if record["event"] == "basis" and record["round"] == "r0001":
        record["tasks"]["dev_slices"] = {"unit_conversion": {"factor": {"low": "3", "high": "9"}}}


def rig_rounds(record: dict[str, Any]) -> None:
    if record["event"] == "init":
        record["facts"]["design"]["rounds"] = 4


def rig_arms(record: dict[str, Any]) -> None:
    if record["event"] == "plan" and record["round"] == "r0003":
        record["plan"]["arms"][2]["overrides"] = [["recipe.lora.rank", "31"]]


def rig_seed(record: dict[str, Any]) -> None:
    if record["event"] == "plan" and record["round"] == "r0002":
        record["plan"]["arms"][1]["seed"] += 1


def rig_policy(record: dict[str, Any]) -> None:
    if record["event"] == "plan" and record["round"] == "r0003":
        record["plan"]["policy"]["dead_ends"] = [["recipe.lora.rank", "3"]]


def rig_closed_key(record: dict[str, Any]) -> None:
    if record["event"] == "plan" and record["round"] == "r0002":
        record["plan"]["arms"][1]["overrides"].append(["recipe.num_steps", "100000"])


def rig_budget(record: dict[str, Any]) -> None:
    if record["event"] == "basis" and record["round"] == "r0003":
        record["time_limit_minutes"] = 10**6


def rig_spent(record: dict[str, Any]) -> None:
    if record["event"] == "basis" and record["round"] == "r0003":
        record["spent_gpu_seconds"] = 0


def rig_image(record: dict[str, Any]) -> None:
    if record["event"] == "attempt" and (record["round"], record["arm"]) == ("r0002", "a5"):
        record["image_digest"] = "1" * 64


def rig_reveal(record: dict[str, Any]) -> None:
    if record["event"] == "reveal" and record["round"] == "r0002":
        record["seed"] = "1" * 64


def rig_caps(record: dict[str, Any]) -> None:
    if record["event"] == "submission":
        record["adapter_digest"] = "1" * 64


def rig_verdict(record: dict[str, Any]) -> None:
    if record["event"] == "proposal" and record["round"] == "r0002":
        record["verdicts"][1] = {**record["verdicts"][0], "slot": 2, "value": "7"}


def rig_marks(record: dict[str, Any]) -> None:
    if record["event"] == "outcome" and (record["round"], record["arm"]) == ("r0001", "a2"):
        fresh = record["outcome"]["outcomes"]["fresh"]
        fresh.update({family: "1" * len(marks) for family, marks in fresh.items()})


RIGGED = {
    rig_articles: "the articles are not those of the constitution",
    rig_critical: "the critical values are neither",
    rig_confirmation: "says something else than the log about policy.confirmation",
    rig_choice: "says something else than the log about policy.choice",
    rig_slice: "the seed, items, proposals or reference recipe are not those that the campaign began with",
    rig_rounds: "the critical values are neither",
    rig_arms: "the arms do not follow from policy, seed and round: a2",
    rig_seed: "the arms do not follow from policy, seed and round: a1",
    rig_policy: "would be planned with another policy than r0002 wrote",
    rig_closed_key: "the arms do not follow",
    rig_budget: "GPU-hours an arm are more than",
    rig_spent: "0 GPU-seconds were counted as spent",
    rig_image: "the attempt had another image_digest than was frozen",
    rig_reveal: "the seed of fresh/r0002 is not the one that was committed to",
    rig_caps: "the caps of article 4 are exceeded, or nobody chose this",
    rig_verdict: "the proposal replayed has other verdicts",
    rig_marks: "the evidence of r0001 does not follow from the outcomes before it",
}


@pytest.mark.parametrize("rig", RIGGED, ids=lambda rig: rig.__name__)
def test_what_does_not_follow_is_caught_though_it_is_signed(rig: Any, ours: SealedCampaign, tmp_path: Path) -> None:
    assert RIGGED[rig] in found(resealed(ours, tmp_path / "rigged", rig))


def test_resealing_alone_finds_nothing(ours: SealedCampaign, tmp_path: Path) -> None:
    assert resealed(ours, tmp_path / "resealed", lambda record: None).ok


@pytest.mark.parametrize("logged", [{}, {"roman": {"question": {"low": "1", "high": "9"}}}])
def test_a_configuration_with_another_slice_than_the_log_is_caught_though_it_is_signed(
    logged: dict[str, Any], tmp_path: Path
) -> None:
    """A judge draws dev by the configuration, and an audit knows dev by the log. Here the one has a slice that the other lacks."""
    campaign = SealedCampaign(gains, levels={"roman": 0.8}, num_items=40, key=tmp_path / "key")
    text = campaign.files["rounds/r0000/config.yaml"].decode()
    assert text.count("  dev_slices: {}\n") == 1
    if not logged:
        text = text.replace(
            "  dev_slices: {}\n", "  dev_slices:\n    roman:\n      question:\n        low: 1\n        high: 9\n"
        )
    campaign.files["rounds/r0000/config.yaml"] = text.encode()

    def rig(record: dict[str, Any]) -> None:
        digest = canonical.sha256(text.encode())
        if record["event"] == "basis":
            record["config_digest"], record["tasks"]["dev_slices"] = digest, logged
        if record["event"] == "plan":
            record["plan"]["config_digest"] = digest

    assert "has other slices of dev (tasks.dev_slices) than the log" in found(
        resealed(campaign, tmp_path / "rigged", rig)
    )


def test_a_slice_of_a_feature_of_two_words_is_read_from_a_configuration() -> None:
    chosen = settings.compose(["+tasks.dev_slices={text_cipher:{unknown letters:{low:0,high:3.5}}}"])
    values = canonical.scalars(settings.to_yaml(chosen))
    assert {key: value for key, value in values.items() if "slices" in key} == {
        "tasks.dev_slices.text_cipher.unknown letters.low": "0",
        "tasks.dev_slices.text_cipher.unknown letters.high": "3.5",
    }


def environment(**changes: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **changes}


BLOCKED = f"""
import sys
import zipfile
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {NOT_NEEDED!r}:
            raise ImportError(name + " is not there")
sys.meta_path.insert(0, Blocked())
from pipeline.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_plain_python_and_cryptography_are_enough(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle.zip"
    for path, more in ((folder, ["--export", str(out)]), (out, [])):
        command = [sys.executable, "-P", "-c", BLOCKED, "audit", str(path), "--json", *more]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout)["ok"] is True


@pytest.mark.parametrize(
    ("changes", "umask"),
    [
        ({"TZ": "Asia/Kathmandu", "LC_ALL": "C", "PYTHONHASHSEED": "random"}, 0o077),
        ({"LC_ALL": "tr_TR.UTF-8", "PYTHONHASHSEED": "7"}, 0),
    ],
)
def test_bytes_derived_again_are_the_same_elsewhere(
    changes: dict[str, str], umask: int, ours: SealedCampaign, tmp_path: Path
) -> None:
    """Another path, locale, time zone, umask and hash seed: decisions and overrides to the byte, and the whole report."""
    code = (
        "import json,sys;from dataclasses import asdict;from pipeline.campaign import canonical;from pipeline.decision import derive;"
        "records=[json.loads(line) for line in open(sys.argv[1],'rb')];"
        "at={r['round']:n for n,r in enumerate(records) if r['event']=='decision'};"
        "found=[derive.derive(records[:n],name) for name,n in at.items()];"
        "print(canonical.sha256(canonical.encoded([[f.evidence.to_json(),asdict(f.decision),canonical.overrides_text(f.overrides)] for f in found])))"
    )
    elsewhere = ours.write(tmp_path / "an other place" / "ä")
    run = [sys.executable, "-P", "-c", code, str(elsewhere / "log.jsonl")]
    done = subprocess.run(run, capture_output=True, text=True, env=environment(**changes), umask=umask)
    derived = [
        [d.evidence.to_json(), asdict(d.decision), canonical.overrides_text(d.overrides or {})]
        for d in ours.derived.values()
    ]
    assert done.stdout.strip() == canonical.sha256(canonical.encoded(derived)), done.stderr
    command = [sys.executable, "-P", "-m", "pipeline", "audit", str(elsewhere), "--json"]
    report = subprocess.run(command, capture_output=True, text=True, env=environment(**changes), umask=umask)
    assert json.loads(report.stdout)["ok"], report.stdout


def test_a_crash_at_any_byte_is_told_and_nothing_else_is_lost(ours: SealedCampaign, tmp_path: Path) -> None:
    copy = ours.write(tmp_path / "crashed")
    log, (*before, last) = Log(copy / "log.jsonl"), ours.lines
    start = b"".join(line + b"\n" for line in before)
    for cut in range(1, len(last) + 1):
        log.path.write_bytes(start + last[:cut])
        assert len(log.records()) == len(before)
        if cut % 50 == 1:
            assert f"log.jsonl: ends with an incomplete record of {cut} bytes" in found(examined(copy))
    log.append("end", round="r0004")
    assert log.path.read_bytes().startswith(start)
    assert any("set aside" in what for what in examined(copy).not_verifiable)


def test_files_left_out_are_told(ours: SealedCampaign, folder: Path, tmp_path: Path) -> None:
    bundle.export(folder, tmp_path / "small.zip")
    bundle.export(folder, tmp_path / "whole.zip", ("adapters", "hdf5", "image"))
    with bundle.opened(tmp_path / "small.zip") as small, bundle.opened(tmp_path / "whole.zip") as whole:
        reports = [examined(small), examined(whole)]
        assert not list(small.rglob("*.h5")) and (small / bundle.CRATE).exists()
    assert all(report.ok for report in reports), [found(report) for report in reports]
    told = "\n".join(reports[0].not_verifiable)
    assert "files are missing and known by digest alone" in told and "32 adapters are missing" in told
    assert not any("digest alone" in what for what in reports[1].not_verifiable)


def test_a_bundle_that_is_larger_than_the_disk_is_not_unpacked(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle.zip"
    bundle.export(folder, out)
    with zipfile.ZipFile(out) as archive:
        archive.infolist()[0].file_size = 2**50  # as a bomb's directory says
        with pytest.raises(IntegrityError, match="has room for"):
            bundle.unpack(archive, tmp_path)


def test_a_bundle_is_the_same_bytes_again_and_describes_its_files(folder: Path, tmp_path: Path) -> None:
    for name in ("one.zip", "two.zip"):
        bundle.export(folder, tmp_path / name)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with bundle.opened(tmp_path / "one.zip") as opened:
        graph = json.loads((opened / bundle.CRATE).read_text())["@graph"]
        files = {each["@id"]: each["sha256"] for each in graph if each["@type"] == "File"}
        assert files and all(file_digest(opened / path) == digest for path, digest in files.items())
    assert "vault" not in json.dumps(graph)


def test_the_command_says_what_to_type_next(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ours: SealedCampaign
) -> None:
    assert main(["audit", str(folder), "--anchor", str(anchor_of(ours))]) == 0
    said = capsys.readouterr().out
    assert "verified        hash chain of" in said and f"next: python -m pipeline audit {folder} --rescore" in said
    (tmp_path / "heads.txt").write_text(f"noted on Monday: {replace(anchor_of(ours), head='0' * 64)}\n")
    assert main(["audit", str(folder), "--anchor", str(tmp_path / "heads.txt"), "--json"]) == 4
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"ok", "verified", "not_verifiable", "findings"}
    assert report["findings"][0] == {"record": len(ours.lines) - 1, "file": None, "what": report["findings"][0]["what"]}
    assert main(["audit", str(folder), "--anchor", "none"]) == 2
    assert main(["audit", str(tmp_path / "nothing")]) == 2
    (tmp_path / "broken.zip").write_bytes(b"PK")
    assert main(["audit", str(tmp_path / "broken.zip")]) == 4


def test_overrides_are_the_real_code_s(ours: SealedCampaign) -> None:
    decision = ours.derived["r0001"].decision
    assert policy_update.overrides(decision, "r0002", RULES) == ours.derived["r0001"].overrides
