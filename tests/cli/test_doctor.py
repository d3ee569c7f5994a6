"""Test that `doctor` and `plan-memory` take a campaign's folder, overrides, or both."""

import json

import pytest

from pipeline.__main__ import main
from pipeline.campaign.layout import Campaign
from pipeline.cluster import doctor
from tests.support.campaigns import changed_byte, fresh_campaign, frozen_campaign, tree
from tests.support.published import published_folder


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
    assert (
        "bad" in said
        and said.splitlines()[-1] == f"next: python -m pipeline doctor {campaign.folder}    (once that is mended)"
    )


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
        assert error.startswith(f"ConfigError: {word} {said}. Valid: the folder of a campaign (")
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


ABSENT = ["experiment=nano_30b", "cluster=slurm", "cluster.weights_dir=/no/such"]
READ_BY = "experiment=nano_30b and experiment=nano_mini read such a folder"


def test_a_dry_run_without_the_weights_ends_with_what_round_refuses(tmp_path, capsys):
    assert main(["round", str(tmp_path / "nano"), *ABSENT, "--dry-run"]) == 0
    refusal, following = capsys.readouterr().out.splitlines()[-2:]
    assert refusal.startswith(
        "`round` refuses it on this machine: ConfigError: cluster.weights_dir = /no/such is not a folder here"
    )
    assert following.endswith("    (once that is mended)")
    assert main(["round", str(tmp_path / "nano"), *ABSENT]) == 2
    assert refusal.partition(": ")[2] == capsys.readouterr().err.strip()


def test_a_check_of_a_wrong_folder_is_that_of_the_round(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_machine", lambda: [])
    outside = ["experiment=smoke", "model.weights=base/weights.json"]
    words = [*outside, f"cluster.weights_dir={published_folder(tmp_path / 'site')}"]
    assert checks(capsys, *words)["base weights"]["verdict"] == "good"
    (tmp_path / "site" / "config.json").write_text('{"hidden_size": 97}')
    found = checks(capsys, *words)
    assert found["base weights"]["verdict"] == "bad" and "the first round" not in found
    for command in (
        ["plan-memory", *words],
        ["round", str(tmp_path / "c"), *words, "--dry-run"],
    ):
        code = main(command)
        printed = capsys.readouterr()
        assert found["base weights"]["found"] in printed.out + printed.err and code == (
            0 if command[0] == "plan-memory" else 2
        )


def test_weights_that_nobody_reads_are_told_by_every_check(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_machine", lambda: [])
    words = ["experiment=smoke", f"cluster.weights_dir={tmp_path}"]
    assert READ_BY in checks(capsys, *words)["base weights"]["found"]
    assert main(["round", str(tmp_path / "c"), *words, "--dry-run"]) == 0
    assert READ_BY in capsys.readouterr().out.splitlines()[-2]
    assert main(["init", str(tmp_path / "c"), *words]) == 0
    assert READ_BY in capsys.readouterr().out


def test_doctor_tells_what_round_refuses_beside_the_machine(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_machine", lambda: [])
    found = checks(capsys, "model=small")["the first round"]
    assert found["verdict"] == "bad" and "experiment=demo is made for 0.7 million" in found["found"]
