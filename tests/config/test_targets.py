"""Test that LoRA targets are counted where a plan is shown, and that one which matches nothing never gets into a frozen round."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.__main__ import main
from pipeline.campaign.errors import ConfigError
from pipeline.config import fit, model_size, settings
from pipeline.config.model_size import Matched, matched_modules
from pipeline.reporting import tables
from substrate.interface.peft_config import TARGETS
from tests.support.campaigns import frozen_campaign

TINY = settings.compose().to_dict()["model"]
NANO = settings.compose(["model=nemotron3_nano_30b"]).to_dict()["model"]
SHOWN = (
    "LoRA targets match 14 modules: attention 8 (q_proj 2, k_proj 2, v_proj 2, o_proj 2); mamba 2 (in_proj 2); "
    "moe 4 (shared_experts.up_proj 2, shared_experts.down_proj 2)."
)


def test_case_10_the_published_model_has_so_many_modules_of_each_target() -> None:
    found = matched_modules(NANO, ["q_proj", "in_proj", "experts.up_proj", "shared_experts.up_proj", "lm_head"])
    assert found == {
        "q_proj": Matched("attention", 6, 6), "in_proj": Matched("mamba", 23, 23), "experts.up_proj": Matched("moe", 23, 23 * 128),
        "shared_experts.up_proj": Matched("moe", 23, 23), "lm_head": Matched("output", 1, 1),
    }  # fmt: skip


@given(st.text("ME*", min_size=1, max_size=9), st.lists(st.sampled_from(sorted(TARGETS)), unique=True, min_size=1))
def test_case_10_a_target_counts_the_pairs_that_an_adapter_must_hold(pattern: str, targets: list[str]) -> None:
    model = TINY | {"pattern": pattern}
    try:
        found = matched_modules(model, targets)
    except ConfigError as error:
        assert any(
            not model_size.adapter_shapes(model, 4, [target]) for target in targets
        ) and "matches nothing" in str(error)
    else:
        for target, matched in found.items():
            assert matched.modules == len(model_size.adapter_shapes(model, 4, [target])) / 2 > 0
            assert matched.kind == TARGETS[target]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.pattern=MMEE"], r"LoRA target q_proj matches nothing, because model tiny \(MMEE\) has no attention layer. Take it out"),
        (["model.pattern=MM**", "recipe.lora.targets=[in_proj,experts.up_proj]"], "experts.up_proj matches nothing, .* no moe layer"),
        (["recipe.lora.targets=[q_proj,gate_proj]"], "LoRA target 'gate_proj' is not known. Valid: q_proj"),
        (["recipe.lora.targets=[q_proj,in_proj,q_proj]"], "q_proj comes twice in recipe.lora.targets. Name it once"),
        (["recipe.lora.targets=[]"], "targets is empty, so nothing would be trained"),
    ],
)  # fmt: skip
def test_case_10_a_target_that_matches_nothing_is_refused_before_anything_is_made(
    tmp_path: Any, capsys: Any, overrides: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        fit.check_plan_fits(settings.compose(overrides))
    for more in ([], ["--dry-run"]):
        assert main(["round", str(tmp_path / "new"), *overrides, *more]) == 2
    assert "LoRA target" in capsys.readouterr().err or "targets is empty" in words
    assert not (tmp_path / "new").exists()


def test_case_10_the_counts_are_shown_with_the_plan(tmp_path: Any, capsys: Any) -> None:
    campaign = str(frozen_campaign(tmp_path).folder)
    for words in (["round", campaign, "--dry-run"], ["round", campaign, "--no-submit"], ["plan-memory", campaign]):
        assert main(words) == 0
        assert capsys.readouterr().out.count(SHOWN) == 1, words
    assert main(["plan-memory", campaign, "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)["lora_targets"]
    assert counts["in_proj"] == {"kind": "mamba", "layers": 2, "modules": 2} and len(counts) == 7


def test_case_10_the_page_has_a_row_for_each_target() -> None:
    chosen = settings.compose(["recipe.lora.targets=[in_proj,experts.up_proj,lm_head]"])
    assert tables.of_targets(chosen) == [
        ["LoRA target", "kind of layer", "layers", "modules"],
        ["in_proj", "mamba", "2", "2"], ["experts.up_proj", "moe", "2", str(2 * TINY["num_experts"])], ["lm_head", "output", "1", "1"],
    ]  # fmt: skip
