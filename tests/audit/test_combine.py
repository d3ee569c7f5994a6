"""Test that campaigns are combined only where they may be, and that what is combined is the E of each sealed log."""

import json
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main
from pipeline.audit import bundle, combine
from pipeline.campaign import heads
from pipeline.campaign.errors import ConfigError, IntegrityError, NotFound, OtherRules, PipelineError, WorkFailed
from pipeline.cli import evidence
from pipeline.cli.evidence import lines_of
from pipeline.decision import derive, history
from pipeline.stats import critical_values
from tests.support.sealed import SealedCampaign, gains, rechained

LEVELS = {"roman": 0.8, "text_cipher": 0.7}


@dataclass
class Related(SealedCampaign):
    """A campaign that may share something with another: `shares` maps the name of a seed of ours to (the other, the name of its seed)."""

    shares: Any = ()
    key_of: SealedCampaign | None = None
    unclosed: str = ""

    def found(self) -> None:
        for name, (other, of) in dict(self.shares).items():
            self.seeds[name] = other.seeds[of]
        if self.key_of:
            self.key, self.public_key = self.key_of.key, self.key_of.public_key
        super().found()

    def close(self, name: str) -> None:
        if name != self.unclosed:
            super().close(name)


@pytest.fixture(autouse=True)
def divisor(monkeypatch: pytest.MonkeyPatch) -> Decimal:
    """Our small designs were not simulated."""
    by = Decimal("1.25")
    monkeypatch.setattr(critical_values, "e_divisor", lambda design: by)
    return by


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


def made(keys: Path, name: str, rounds: int = 2, **fields: Any) -> Related:
    campaign = Related(gains, levels=LEVELS, num_items=20, campaign=name, key=keys / name, **fields)
    for _ in range(rounds):
        campaign.play()
    return campaign


@pytest.fixture(scope="module")
def first(keys: Path) -> Related:
    return made(keys, "first-0001")


@pytest.fixture(scope="module")
def second(keys: Path) -> Related:
    return made(keys, "second-0001", rounds=3)


def e_value(campaign: SealedCampaign, name: str) -> Decimal:
    """E from all records of the log, read anew."""
    look = derive.evidence_of(history.read_history(campaign.records), name).look
    assert look
    return look.verdict.e_value


def test_each_campaign_says_its_e_and_together_they_say_the_product(
    first: Related, second: Related, tmp_path: Path, divisor: Decimal
) -> None:
    paths = [first.write(tmp_path / "first"), tmp_path / "second.zip"]
    bundle.export(second.write(tmp_path / "second"), paths[1])
    whole = [e_value(first, "r0002"), e_value(second, "r0003")]
    expected = [value / divisor for value in whole]
    assert all(value not in (0, 1) for value in expected)
    for order in (1, -1):
        found = combine.combine(paths[::order])
        assert [each.board_e for each in found.campaigns] == whole[::order]
        assert [float(each.e_value) for each in found.campaigns] == pytest.approx([*map(float, expected[::order])])
        assert [each.round for each in found.campaigns] == ["r0002", "r0003"][::order]
        assert float(found.product) == pytest.approx(prod(map(float, expected)))
        assert float(found.mean) == pytest.approx(float(sum(map(Fraction, expected)) / 2))
        assert found.is_said == (prod(map(float, expected)) > 20)
        assert "2 of 8 rounds; E holds whenever one looks" in found.campaigns[0 if order == 1 else 1].note


def test_what_combined_campaigns_may_share_is_told(first: Related, second: Related, tmp_path: Path) -> None:
    found = combine.combine([first.write(tmp_path / "first"), second.write(tmp_path / "second")])
    told = "\n".join(found.shared)
    assert "have targets of one kind, local: each has hidden items of its own" in told
    assert "trained with the same image and seed=1" in told
    assert not combine.combine([tmp_path / "first"]).shared


@pytest.mark.parametrize(
    ("external", "note"), [("none", "it has no external target, so E is 1"), ("manual", "no score yet, so E is 1")]
)
def test_a_campaign_without_a_target_or_scores_counts_as_1(
    external: str, note: str, first: Related, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if external == "manual":
        monkeypatch.setattr(Related, "score", lambda *_: None)
    silent = made(keys, f"{external}-0001", rounds=1, external=external)
    found = combine.combine([first.write(tmp_path / "first"), silent.write(tmp_path / "silent")])
    assert found.campaigns[1].e_value == 1 and note in found.campaigns[1].note and found.campaigns[1].num_scores == 0
    assert found.product == found.campaigns[0].e_value
    assert not any("targets of one kind" in what for what in found.shared)


@pytest.mark.parametrize("value", ["0.3", "20", "20.0001"])
def test_it_is_said_only_above_the_threshold(value: str) -> None:
    one = combine.CampaignEvidence("a", "a-1", "r0004", 4, "local", 8, Decimal(value), Decimal(1), Decimal(value), "")
    half = replace(one, given="b", e_value=Decimal("0.5"))
    assert combine.Combined((one,), "c", ()).is_said == (value == "20.0001")
    both = combine.Combined((one, half, replace(half, e_value=Decimal(2))), "c", ())
    assert both.product == Decimal(value) and both.mean * 3 == pytest.approx(Decimal(value) + Decimal("2.5"))
    assert both.threshold == 1 / combine.ALPHA == 20


def test_the_product_decides_only_over_as_many_campaigns_as_were_simulated() -> None:
    one = combine.CampaignEvidence("a", "a-1", "r0004", 4, "local", 8, Decimal(3), Decimal(1), Decimal(3), "")
    other = replace(one, target="kaggle")
    for campaigns, decides in (
        ([one] * 5, "product"), ([one] * 6, "mean"), ([one] * 5 + [other] * 5, "product"), ([one] * 4 + [other] * 6, "mean"),
        ([one] * 5 + [replace(one, target="none")] * 5, "product"), ([one] * 5 + [replace(one, target="none")] * 6, "mean"),
    ):  # fmt: skip
        found = combine.Combined(tuple(campaigns), "c", ())
        assert (found.decides, found.is_said) == (decides, decides == "product")
        assert any("The mean decides" in line for line in evidence.lines_of(found)) == (decides == "mean")


def test_a_design_that_nobody_simulated_counts_as_1(
    first: Related, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    (campaign,) = combine.combine([first.write(tmp_path / "first")]).campaigns
    assert campaign.e_value == 1 and "no simulation says how large E is for its design" in campaign.note


def refused(error: type[PipelineError], *paths: Path, **options: Any) -> str:
    with pytest.raises(error) as caught:
        combine.combine(paths, **options)
    assert caught.value.cure
    return str(caught.value)


def test_nothing_to_combine_is_refused() -> None:
    with pytest.raises(ConfigError, match="no campaign was given"):
        combine.combine([])


def test_one_campaign_twice_is_refused(first: Related, tmp_path: Path) -> None:
    path, copy = first.write(tmp_path / "first"), first.write(tmp_path / "copy")
    assert "are one campaign, first-0001. Valid: one bundle of each campaign" in refused(ConfigError, path, copy)
    assert "given twice" in refused(ConfigError, path, path)


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [("dev", "dev", "the seed of dev"), ("fresh/r0007", "fresh/r0007", "the seed of fresh/r0007"),
     ("fresh/r0005", "fresh/r0001", "the seed of fresh/r0005"), ("board", "fresh/r0002", "the seed of board")],
)  # fmt: skip
def test_campaigns_that_share_a_seed_are_refused(
    ours: str, theirs: str, told: str, first: Related, keys: Path, tmp_path: Path
) -> None:
    """By their commitments, and under another name by what was revealed."""
    name = f"related-{ours.replace('/', '-')}-{theirs.replace('/', '-')}"
    related = made(keys, name, rounds=1, shares=[(ours, (first, theirs))])
    paths = [first.write(tmp_path / "first"), related.write(tmp_path / "related")]
    for order in (1, -1):
        message = refused(ConfigError, *paths[::order])
        assert f"share {told}, so they are not independent and their product means nothing" in message


def test_campaigns_that_share_a_key_are_refused(first: Related, keys: Path, tmp_path: Path) -> None:
    related = made(keys, "same-key", rounds=1, key_of=first)
    message = refused(ConfigError, first.write(tmp_path / "first"), related.write(tmp_path / "related"))
    assert "share their signing key" in message


def test_campaigns_of_several_constitutions_are_not_combined(first: Related, second: Related, tmp_path: Path) -> None:
    def rename(record: dict[str, Any]) -> dict[str, Any]:
        if record["event"] != "init":
            return record
        return {**record, "facts": {**record["facts"], "constitution_digest": "1" * 64}}

    other = second.write(tmp_path / "other")
    lines = rechained([rename(json.loads(line)) for line in second.lines], second.key)
    (other / "log.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    message = refused(ConfigError, first.write(tmp_path / "first"), other)
    assert "different constitutions" in message and f"{other} has 1111111111111111" in message
    assert f"Run `evidence` with the code of {second.code_digest[:16]}: `PYTHONPATH=" in refused(OtherRules, other)


def test_a_campaign_that_an_audit_finds_something_in_is_not_combined(
    first: Related, second: Related, tmp_path: Path
) -> None:
    good, bad = first.write(tmp_path / "first"), second.write(tmp_path / "second")
    (bad / "rounds/r0001/evidence.json").write_bytes(b"{}")
    message = refused(IntegrityError, good, bad)
    assert f"the audit of {bad} has a finding (rounds/r0001/evidence.json: has the sha256" in message
    assert f"`python -m pipeline audit {bad}` lists all" in message
    (bad / "log.jsonl").write_bytes(b"\x1b[2J\n")
    assert "does not begin with what a campaign froze" in refused(IntegrityError, good, bad)
    (bad / "log.jsonl").unlink()
    assert "holds no log.jsonl" in refused(NotFound, good, bad)
    (tmp_path / "broken.zip").write_bytes(b"PK")
    assert "is not an undamaged bundle" in refused(IntegrityError, good, tmp_path / "broken.zip")
    assert "does not exist" in refused(NotFound, good, tmp_path / "nothing")


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [("critical", {"gap_level": "0.5"}, "the critical values are neither those simulated for this design"),
     ("design", {"rounds": 9}, "the design has other rounds"), ("design", {"dev_items": 300}, "other numbers of items than the design")],
)  # fmt: skip
def test_a_design_that_does_not_match_its_critical_values_is_not_combined(
    field: str, value: dict[str, Any], found: str, first: Related, tmp_path: Path
) -> None:
    records = [json.loads(line) for line in first.lines]
    records[0]["facts"][field] |= value
    path = first.write(tmp_path / "first")
    (path / "log.jsonl").write_bytes(b"".join(line + b"\n" for line in rechained(records, first.key)))
    assert found in refused(IntegrityError, path)


def test_a_round_that_no_signed_head_covers_does_not_count(keys: Path, tmp_path: Path) -> None:
    open_yet = made(keys, "open-0001", unclosed="r0002")
    found = combine.combine([open_yet.write(tmp_path / "open")])
    assert [(each.round, each.board_e) for each in found.campaigns] == [("r0001", e_value(open_yet, "r0001"))]
    none_yet = made(keys, "open-0002", rounds=1, unclosed="r0001")
    assert "no decided round of" in refused(WorkFailed, none_yet.write(tmp_path / "none"))


def test_anchors_are_those_of_any_of_the_campaigns(
    first: Related, second: Related, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [first.write(tmp_path / "first"), second.write(tmp_path / "second")]
    kept = [heads.newest_anchor(each.lines, each.campaign) for each in (first, second)]
    assert combine.combine(paths, kept).product == combine.combine(paths).product
    wrong = replace(kept[1], head="0" * 64)
    message = refused(IntegrityError, *paths, anchors=[kept[0], wrong])
    assert "history was rewritten, unless the anchor is not as it was printed" in message
    assert f"audit {paths[1]} --anchor {wrong}` lists all" in message and "or the anchor as it was printed" in message
    assert main(["evidence", "combine", *map(str, paths), "--anchor", str(kept[0]), "--anchor", str(kept[1])]) == 0
    assert "All 2 anchors that were given are in the logs." in capsys.readouterr().out
    found = combine.combine(paths[:1])
    assert any(line.startswith("One campaign is no combination") for line in lines_of(found))
    without = replace(found, campaigns=tuple(replace(each, target="none") for each in found.campaigns))
    assert lines_of(without) == [
        "None of these campaigns has an external target, so there is nothing to combine: E is 1 for each."
    ]
    assert "none of these campaigns" in refused(ConfigError, paths[0], anchors=kept)


def test_the_command_prints_sentences_or_json(
    first: Related, second: Related, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(first.write(tmp_path / "first")), str(second.write(tmp_path / "second"))]
    assert main(["evidence", "combine", *paths]) == 0
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("E ") for line in said) == 4
    assert all(line in said for line in combine.DOES_NOT_SAY)
    assert sum("at least one of these campaigns" in line for line in said) == 1
    assert said[-1] == f"next: python -m pipeline audit {paths[0]} --rescore"
    assert main(["evidence", "combine", *paths, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == combine.combine([*map(Path, paths)]).to_json()
    assert report["threshold"] == "20" and report["alpha"] == "1/20" and len(report["does_not_say"]) == 5
    assert Decimal(report["campaigns"][0]["board_e"]) == e_value(first, "r0002")
    assert main(["evidence", "combine", paths[0], paths[0]]) == 2
    assert capsys.readouterr().err.startswith(f"ConfigError: {paths[0]} was given twice")
