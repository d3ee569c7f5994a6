"""Test what the memory plan lets training recompute, and that the frozen configuration of a round says it."""

import pytest

from pipeline.__main__ import main
from pipeline.campaign.errors import ConfigError
from pipeline.config import fit, footprint, settings
from pipeline.config.footprint import RECOMPUTE

NANO = ["experiment=nano_30b", "cluster=slurm_pyxis", "parallelism=tp1"]


def peaks(*words: str) -> dict[str, float]:
    """GiB of a training rank, the reserve included, by what is recomputed."""
    found = {}
    for mode in RECOMPUTE:
        config = settings.compose([*NANO, *words, f"parallelism.recompute={mode}"]).to_dict()
        needed = footprint.of_arm(config)["training"].peak
        found[mode] = (needed + footprint.DEVICE_RESERVE_BYTES) / 2**30
    return found


@pytest.mark.parametrize("scan", ["torch", "triton"])
@pytest.mark.parametrize("tokens", [2048, 8192, 16384])
def test_auto_takes_the_first_that_fits(scan, tokens):
    words = [f"cluster.capacity.scan={scan}", f"recipe.micro_batch_tokens={tokens}"]
    needed = peaks(*words)
    assert needed["none"] > needed["selective"] > needed["full"]
    for room in (needed["none"] + 1, needed["selective"] + 1, needed["full"] + 1, needed["full"] - 1):
        config = settings.compose([*NANO, *words, f"cluster.capacity.gpu_memory_gib={room}"]).to_dict()
        expected = next((mode for mode in RECOMPUTE if needed[mode] <= room), "full")
        chosen, why = footprint.recompute_of(config)
        assert chosen == expected
        assert all((f"{mode} needs" in why) == (RECOMPUTE.index(mode) <= RECOMPUTE.index(chosen)) for mode in RECOMPUTE)
        if room < needed["full"]:
            with pytest.raises(ConfigError, match="training needs"):
                footprint.check_memory(config)


def test_the_plan_with_the_triton_scan_is_what_an_h200_held():
    """design/gpu.md, one sequence of 8,192 tokens: 83.5 GiB where nothing is recomputed, 64.1 GiB where all layers are."""
    needed = peaks("cluster.capacity.scan=triton", "recipe.micro_batch_tokens=8192")
    reserve = footprint.DEVICE_RESERVE_BYTES / 2**30
    assert needed["none"] - reserve == pytest.approx(83.5, rel=0.05)
    assert needed["full"] - reserve == pytest.approx(64.1, rel=0.05)


def test_without_a_known_memory_cores_recompute_nothing_and_gpus_everything():
    for words, expected in ((["experiment=demo"], "none"), ([*NANO, "cluster.capacity.gpu_memory_gib=0"], "full")):
        assert footprint.recompute_of(settings.compose(words).to_dict())[0] == expected


@pytest.mark.parametrize(("given", "meant"), [("true", "full"), ("false", "none"), ("selective", "selective")])
def test_an_explicit_choice_stays(given, meant):
    """Also as configurations had it before there were words."""
    chosen = settings.compose([*NANO, f"parallelism.recompute={given}"])
    assert chosen.parallelism.recompute == meant
    assert footprint.recompute_of(chosen.to_dict())[0] == meant
    assert fit.with_recompute(chosen, [()]) is chosen


@pytest.mark.parametrize("word", ["parallelism.recompute=some", "cluster.capacity.scan=cuda"])
def test_another_word_is_refused(word):
    with pytest.raises(ConfigError, match="Valid: auto"):
        settings.compose([*NANO, word])


def test_the_arm_that_needs_most_decides_for_all():
    words = ["cluster.capacity.scan=triton", "recipe.lora.rank=1"]
    room = peaks(*words)["none"] + 0.01
    chosen = settings.compose([*NANO, *words, f"cluster.capacity.gpu_memory_gib={room}"])
    assert fit.with_recompute(chosen, [()]).parallelism.recompute == "none"
    assert fit.with_recompute(chosen, [(), (("recipe.lora.rank", "32"),)]).parallelism.recompute == "selective"


def test_the_scan_is_triton_where_jobs_have_mamba_ssm(tmp_path, monkeypatch):
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("raise ImportError('nothing here may import it')")
    bare = ["experiment=nano_30b", "cluster=slurm"]
    assert footprint.scan_of(settings.compose(bare).to_dict())[0] == "torch"
    monkeypatch.syspath_prepend(tmp_path)
    assert footprint.scan_of(settings.compose(bare).to_dict())[0] == "triton"
    assert footprint.scan_of(settings.compose(["experiment=demo"]).to_dict())[0] == "torch", "no GPUs"
    container = footprint.scan_of(settings.compose([*bare, "cluster.runtime=[srun]"]).to_dict())
    assert container[0] == "torch" and "cluster.capacity.scan=triton" in container[1]


def test_plan_memory_and_a_frozen_round_say_it(tmp_path, capsys):
    """A dry run freezes a round in a temporary copy, whose configuration has the choice."""
    words = ["experiment=smoke", "cluster.capacity.gpu_memory_gib=139"]
    assert main(["plan-memory", *words]) == 0
    assert "Training recomputes none (none needs " in capsys.readouterr().out
    assert main(["round", str(tmp_path / "runs" / "mine"), *words, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "recompute none" in printed and "recompute auto" not in printed
    assert "Training recomputes none (none needs " in printed
