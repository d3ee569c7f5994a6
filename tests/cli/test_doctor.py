"""Test that `doctor` and `plan-memory` take a campaign's folder, overrides, or both."""

import json

import pytest

from pipeline.__main__ import main
from pipeline.campaign.layout import Campaign
from pipeline.cluster import doctor
from tests.support.campaigns import changed_byte, fresh_campaign, frozen_campaign, tree


@pytest.fixture
def campaign(tmp_path) -> Campaign:
    return frozen_campaign(tmp_path)


def checks(capsys, *words: object) -> dict[str, dict[str, str]]:
    """Those of `doctor WORDS --json`, by name."""
    main(["doctor", *map(str, words), "--json"])
    return {check["name"]: check for check in json.loads(capsys.readouterr().out)}


def test_a_campaign_is_checked_with_its_frozen_configuration(campaign, capsys, monkeypatch):
    before = tree(campaign.folder)
    monkeypatch.setattr(doctor, "_machine", lambda: [])
    found = checks(capsys, campaign.folder)
    assert {"frozen facts", "frozen code", "image", "frozen plans", "vault", "disk", "configuration"} <= set(found)
    assert found["frozen plans"]["found"] == "2 plans agree with the sealed log"
    assert found["configuration"]["found"].startswith("model tiny, 2 ranks an arm")
    assert tree(campaign.folder) == before
    with changed_byte(campaign.image):
        assert main(["doctor", str(campaign.folder)]) == 1
    said = capsys.readouterr().out
    assert "bad" in said and said.splitlines()[-1] == f"next: python -m pipeline doctor {campaign.folder}"


def test_a_campaign_whose_first_round_is_not_frozen_yet_is_checked(tmp_path, capsys):
    assert checks(capsys, fresh_campaign(tmp_path).folder)["frozen plans"]["verdict"] == "good"


def test_overrides_alone_are_checked_without_a_campaign(capsys):
    found = checks(capsys, "cluster=local", "experiment=nano_30b")
    assert "2 ranks need" in found["memory of an arm"]["found"] and "frozen facts" not in found


def test_overrides_change_a_campaign_s_configuration_for_the_check_alone(campaign, capsys):
    before = tree(campaign.folder)
    found = checks(capsys, campaign.folder, "cluster.scratch_dir=/absent")
    assert found["scratch"]["found"] == "you may not write in /absent" and found["frozen facts"]["verdict"] == "good"
    assert checks(capsys, "cluster.scratch_dir=/absent", campaign.folder) == found
    assert tree(campaign.folder) == before


def test_doctor_refuses_overrides_that_the_frozen_campaign_refuses(campaign, capsys):
    """With the words of `round`. The words it was frozen with are taken, and so is what may change between rounds."""
    assert main(["round", str(campaign.folder), "recipe.num_steps=7", "--dry-run"]) == 2
    refusal = capsys.readouterr().err
    assert main(["doctor", str(campaign.folder), "recipe.num_steps=7"]) == 2
    assert capsys.readouterr().err == refusal and "was frozen with experiment=smoke" in refusal
    assert "configuration" in checks(capsys, campaign.folder, "experiment=smoke", "cluster.arms_at_once=3")


@pytest.mark.parametrize("name", ["doctor", "plan-memory"])
def test_a_word_that_is_neither_is_told_both_forms(name, tmp_path, capsys):
    for word, said in (
        ("nano_30b", "is neither a campaign's folder nor an override"),
        (str(tmp_path), "is a folder, and no campaign"),
    ):
        assert main([name, word]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"ConfigError: {word} {said}. Valid: `{name} runs/demo`")
        assert f"`{name} cluster=slurm_pyxis`" in error


def test_one_campaign_at_a_time(campaign, tmp_path, capsys):
    assert main(["doctor", str(campaign.folder), str(campaign.folder)]) == 2
    assert "doctor was given 2 campaigns. Valid: one at a time" in capsys.readouterr().err


def test_a_configuration_that_is_lost_is_an_integrity_error(campaign, capsys):
    campaign.round("r0001").config.unlink()
    assert main(["doctor", str(campaign.folder)]) == 4
    assert "config.yaml is missing. Restore it from a copy" in capsys.readouterr().err


def test_what_a_campaign_takes_is_shown_by_its_folder(campaign, capsys):
    assert main(["plan-memory", str(campaign.folder)]) == 0
    said = capsys.readouterr().out
    assert "The model tiny has" in said
    assert said.splitlines()[-1].endswith(f"next: python -m pipeline round {campaign.folder} --dry-run")
    assert main(["plan-memory", str(campaign.folder), "recipe.lora.rank=32", "--json"]) == 0
    more = json.loads(capsys.readouterr().out)
    assert main(["plan-memory", str(campaign.folder), "--json"]) == 0
    assert more["adapter_parameters"] > json.loads(capsys.readouterr().out)["adapter_parameters"]
