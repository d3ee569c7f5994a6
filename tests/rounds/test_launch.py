"""Test freezing and starting a round: what is refused, and that a refusal changes nothing."""

import fcntl
import os
import shlex
import shutil

import pytest

from pipeline.__main__ import main
from pipeline.audit import bundle, findings, log_schema
from pipeline.audit.examine import examine
from pipeline.campaign.errors import ConfigError, IntegrityError, NotFound, Refused
from pipeline.campaign.files import read_json
from pipeline.campaign.layout import Campaign
from pipeline.campaign.log import Log
from pipeline.config import corrections
from pipeline.rounds import freeze, launch
from pipeline.rounds.freeze import write_overrides
from pipeline.rounds.init import init
from tests.support.campaigns import OVERRIDES, changed_byte, fresh_campaign, frozen_campaign, publish, tree


@pytest.fixture
def campaign(tmp_path) -> Campaign:
    return fresh_campaign(tmp_path)


def test_a_frozen_round_is_left_as_it_is(tmp_path):
    campaign = frozen_campaign(tmp_path)
    before = tree(campaign.folder)
    freeze.freeze(campaign, "r0001", [])
    freeze.freeze(campaign, "r0001", OVERRIDES)
    assert tree(campaign.folder) == before


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["recipe.num_steps=3"], "recipe.num_steps=3"),
        ([*OVERRIDES, "recipe.num_steps=3"], "recipe.num_steps=3"),
        (["experiment=demo"], "was frozen with"),
    ],
)
def test_what_a_campaign_computes_does_not_change_between_rounds(campaign, overrides, named):
    before = tree(campaign.folder)
    with pytest.raises(ConfigError, match=named):
        freeze.freeze(campaign, "r0001", overrides)
    assert tree(campaign.folder) == before


def test_a_number_of_rounds_that_the_command_chose_is_not_typed_again(campaign):
    facts = {"overrides": [*OVERRIDES, "policy.rounds=4"]}
    freeze.check_overrides(campaign, facts, OVERRIDES)
    freeze.check_overrides(campaign, facts, [*OVERRIDES, "policy.rounds=4"])
    for words in ([*OVERRIDES, "policy.rounds=3"], ["experiment=demo"]):
        with pytest.raises(ConfigError, match="was frozen with"):
            freeze.check_overrides(campaign, facts, words)


def test_a_frozen_round_stays_on_its_cluster(tmp_path):
    campaign = frozen_campaign(tmp_path)
    with pytest.raises(ConfigError, match="frozen for another cluster"):
        freeze.freeze(campaign, "r0001", ["cluster=testbed"])


def test_another_cluster_may_run_the_next_round(campaign):
    folder = freeze.freeze(campaign, "r0001", ["cluster=testbed"])
    assert not launch.is_local(folder)


def test_a_round_without_overrides_is_not_known(campaign):
    with pytest.raises(ConfigError, match="round r0002 has no overrides yet. Known: r0000, r0001"):
        freeze.freeze(campaign, "r0002", [])


def test_a_folder_that_is_no_campaign_is_named(tmp_path):
    with pytest.raises(NotFound, match="is not a campaign"):
        freeze.next_round(Campaign.at(tmp_path / "nothing"))


def test_the_budget_of_rounds_is_an_article(campaign):
    write_overrides(campaign, "r0009", {"round": "r0009"})
    with pytest.raises(Refused, match="article 4"):
        freeze.freeze(campaign, "r0009", [])


def test_changed_frozen_code_is_refused(campaign):
    (changed,) = campaign.folder.glob("**/pipeline/decision/decide.py")
    before = tree(campaign.folder / "rounds")
    with changed_byte(changed), pytest.raises(IntegrityError, match="code"):
        freeze.freeze(campaign, "r0001", [])
    assert tree(campaign.folder / "rounds") == before


def test_a_changed_image_is_refused_before_anything_is_submitted(tmp_path):
    campaign = frozen_campaign(tmp_path)
    with (
        changed_byte(campaign.image, campaign.image.stat().st_size // 2),
        pytest.raises(IntegrityError, match="substrate.sqsh"),
    ):
        launch.submit(campaign, campaign.round("r0001"))
    assert not campaign.round("r0001").submitted.exists()


def test_without_sbatch_nothing_counts_as_submitted(tmp_path, monkeypatch):
    campaign = frozen_campaign(tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "unsquashfs").symlink_to(shutil.which("unsquashfs") or "")
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(ConfigError, match="sbatch"):
        launch.submit(campaign, campaign.round("r0001"))
    assert not campaign.round("r0001").submitted.exists()


def test_one_round_command_at_a_time(tmp_path):
    folder = frozen_campaign(tmp_path).round("r0001")
    with open(folder.folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for start in (launch.submit, lambda campaign, which: launch.run_here(campaign, which, lambda: None)):
            with pytest.raises(ConfigError, match="another `round` of r0001 runs now"):
                start(Campaign.at(folder.folder.parent.parent), folder)


def test_a_round_of_slurm_is_not_run_here(tmp_path):
    campaign = frozen_campaign(tmp_path)
    folder = campaign.round("r0001")
    folder.submitted.write_text('{"kind":"slurm","array_job_ids":["7","8"]}')
    with pytest.raises(ConfigError, match="was submitted to Slurm"):
        launch.run_here(campaign, folder, lambda: None)
    with pytest.raises(ConfigError, match=r"submitted already \(jobs 7, 8\)"):
        launch.submit(campaign, folder)


def test_r0000_runs_beside_the_first_round_until_it_is_published(campaign):
    folder = freeze.freeze(campaign, "r0001", [])
    names = [[stage[2:4] for stage in stages] for stages in launch.arrays(campaign, folder)]
    assert names == [[("r0001", f"a{n}") for n in range(8)], [("r0000", "a0"), ("r0000", "a1")]]
    publish(campaign.round("r0000"), "a0")
    publish(campaign.round("r0000"), "a1", None)  # failed: to be tried again
    assert [stage[2:4] for stage in launch.arrays(campaign, folder)[1]] == [("r0000", "a1")]


def test_what_slurm_is_asked_for_is_what_was_frozen(campaign):
    own = [
        "cluster=testbed",
        "cluster.partition=batch",
        "cluster.account=lab",
        "cluster.meta.partition=cpu",
        "cluster.sbatch={exclude:n3}",
    ]
    folder = freeze.freeze(campaign, "r0001", own)
    asked = launch.resources(folder)
    assert {role: (request.partition, request.account) for role, request in asked.requests.items()} == {
        "worker": ("batch", "lab"), "reference": ("batch", "lab"), "judge": ("batch", "lab"), "meta": ("cpu", "lab"),
    }  # fmt: skip
    texts = {path.stem: path.read_text() for path in folder.slurm_dir.glob("*.sbatch")}
    assert "#SBATCH --array=0-7" in texts["array_0"]
    assert {name: text.count("#SBATCH --partition=batch\n") for name, text in texts.items()} == {
        "array_0": 1, "array_1": 1, "reference": 1, "judge": 1, "meta": 0,
    }  # fmt: skip
    assert "#SBATCH --partition=cpu\n" in texts["meta"] and "#SBATCH --exclude=n3\n" in texts["meta"]
    assert read_json(folder.plan)["round"] == "r0001"


@pytest.mark.parametrize("name", ["ü", "a b", "-x", "a;b", ".."])
def test_a_name_that_breaks_commands_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot name a campaign|exists"):
        init(Campaign(tmp_path / name), OVERRIDES)
    assert not list(tmp_path.iterdir())


def test_a_campaign_below_an_odd_folder_is_frozen(tmp_path):
    """Hydra's grammar, sbatch's and the shell's each quote in their own way."""
    folder = tmp_path / "o'd d \"ü;$x&"
    folder.mkdir()
    campaign = fresh_campaign(folder)
    frozen = freeze.freeze(campaign, "r0001", ["cluster=testbed"])
    assert frozen.plan.exists()
    for path in frozen.slurm_dir.glob("*.sbatch"):
        outputs = [
            line.split("=", 1)[1] for line in path.read_text().splitlines() if line.startswith("#SBATCH --output")
        ]
        assert shlex.split(outputs[0])[0].startswith(str(folder))


def refusing(tmp_path, monkeypatch) -> None:
    """Slurm's clients, of which sbatch takes jobs of the partition `cpu` alone. `taken` gets a line for each."""
    programs = tmp_path / "clients"
    programs.mkdir()
    texts = {
        "sbatch": 'grep -q "^#SBATCH --partition=cpu" "$1" || { echo "sbatch: error: warn" >&2; '
        'echo "sbatch: error: invalid partition specified: batch" >&2; exit 1; }\n'
        f'echo taken >> {tmp_path}/taken; echo "Submitted batch job $(wc -l < {tmp_path}/taken)"',
        "srun": "", "scontrol": "exit 1", "scancel": "", "squeue": "echo 'ARRAY_JOB_ID|COMMENT'",
    }  # fmt: skip
    for name, text in texts.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")


def test_a_round_that_slurm_refused_takes_other_slurm_settings(campaign, tmp_path, monkeypatch, capsys):
    refusing(tmp_path, monkeypatch)
    name = str(campaign.folder)
    assert main(["round", name, "cluster=testbed", "cluster.partition=batch"]) == 1
    said = capsys.readouterr().err
    assert "invalid partition specified: batch" in said and f"round {name} cluster.partition=NAME" in said
    folder = campaign.round("r0001")
    sealed = folder.plan.read_bytes(), folder.config.read_bytes()
    assert main(["status", name]) == 0
    said = capsys.readouterr().out
    assert f"no job of it was submitted; this starts it: python -m pipeline round {name}\n" in said
    assert "python -m pipeline meta" not in said
    assert main(["round", name, "cluster.partition=cpu", "cluster.cpus_per_task=1"]) == 0
    capsys.readouterr()
    assert (tmp_path / "taken").read_text().count("taken") == 4
    assert (folder.plan.read_bytes(), folder.config.read_bytes()) == sealed
    (record,) = (each for each in Log(campaign.log).records() if each["event"] == "slurm_request")
    assert set(record["changed"]) == {
        f"cluster.{role}{key}"
        for role in ("", "reference.", "judge.", "agent.", "meta.")
        for key in ("partition", "cpus_per_task")
    }
    for of in (folder, campaign.round("r0000")):
        assert corrections.of_round(of).cluster.request("worker").partition == "cpu"
    # A worker compares its cores with what was asked for, and `chain` takes the words on into the next round.
    assert corrections.of_round(folder).cluster.cpus_per_task == 1
    assert read_json(folder.operational) == ["cluster=testbed", "cluster.partition=cpu", "cluster.cpus_per_task=1"]
    assert main(["round", name, "cluster.partition=batch"]) == 2
    assert "r0001 was begun" in capsys.readouterr().err
    report = findings.Report()
    log_schema.check_records(Log(campaign.log).records(), report)
    assert not report.findings


def test_arms_that_began_before_the_meta_job_was_refused_keep_nobody_from_correcting_it(
    campaign, tmp_path, monkeypatch, capsys
):
    refusing(tmp_path, monkeypatch)
    name = str(campaign.folder)
    assert main(["round", name, "cluster=testbed", "cluster.partition=cpu", "cluster.meta.partition=batch"]) == 1
    assert "sbatch refused smoke-r0001-meta: " in capsys.readouterr().err
    campaign.round("r0001").claim_attempt("a0")
    assert main(["status", name]) == 0
    assert f"this starts it: python -m pipeline round {name}\n" in capsys.readouterr().out
    assert main(["round", name, "cluster.meta.partition=cpu"]) == 0


def test_a_correction_changes_nothing_that_is_sealed_or_counted(campaign):
    freeze.freeze(campaign, "r0001", ["cluster=testbed"])
    before = tree(campaign.folder)
    for wrong, named in (
        ("cluster.time_limit_minutes=100000", "article 4 counted"),
        ("cluster.gpus_per_node=2", "frozen for another cluster.*gpus_per_node=2"),
        ("cluster.scratch_dir=/elsewhere", "scratch_dir=/elsewhere"),
        ("cluster.runtime=[python3]", "runtime"),
        ("cluster.mem=900", "mem"),  # by the rules of every request
    ):
        with pytest.raises(ConfigError, match=named):
            freeze.freeze(campaign, "r0001", [wrong])
    assert tree(campaign.folder) == before
    freeze.freeze(campaign, "r0001", ["cluster.time_limit_minutes=5", "cluster=testbed"])
    assert launch.resources(campaign.round("r0001")).requests["worker"].time_limit_minutes == 5


def test_the_digest_of_a_correction_is_in_the_log(campaign):
    folder = freeze.freeze(campaign, "r0001", ["cluster=testbed"])
    freeze.freeze(campaign, "r0001", ["cluster.account=lab"])
    freeze.freeze(campaign, "r0001", ["cluster.account=lab2"])
    assert not any("slurm_request" in (found.file or "") for found in examine(campaign.folder).findings)
    bundle.export(campaign.folder, campaign.folder.parent / "bundle.zip")
    with bundle.opened(campaign.folder.parent / "bundle.zip") as unpacked:
        assert not any("slurm_request" in (found.file or "") for found in examine(unpacked).findings)
    folder.slurm_request.write_bytes(folder.slurm_request.read_bytes().replace(b"lab2", b"lab3"))
    assert any("slurm_request.json" in (found.file or "") for found in examine(campaign.folder).findings)


def test_words_of_another_site_drop_those_of_the_old_one():
    old = ["cluster=site", "cluster.partition=gpu", "campaign.auto=true"]
    assert corrections.merged(old, ["cluster=site", "cluster.account=lab"]) == [
        "cluster.partition=gpu", "campaign.auto=true", "cluster=site", "cluster.account=lab",
    ]  # fmt: skip
    assert corrections.merged(old, ["cluster=other"]) == ["campaign.auto=true", "cluster=other"]
    assert corrections.merged(old, ["cluster.partition=cpu"]) == [
        "cluster=site",
        "campaign.auto=true",
        "cluster.partition=cpu",
    ]
