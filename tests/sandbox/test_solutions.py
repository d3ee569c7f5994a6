"""Test that a recipe whose completions would all be cut is refused before a campaign is made, in a dry run too."""

from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.campaign.errors import ConfigError
from pipeline.config import settings
from pipeline.rounds import init
from pipeline.sandbox import entries
from substrate.payload import write_payload
from tests.support.paths import ROOT

GRPO = ["experiment=smoke", "recipe=grpo", "recipe.num_steps=8", "recipe.batch_size=8", "recipe.options.sft_steps=4"]


@pytest.mark.parametrize("recipe", ["grpo", "rft"])
def test_completions_that_would_all_be_cut_are_refused_in_a_dry_run(tmp_path, capsys, recipe):
    words = [f"recipe={recipe}", "recipe.options.max_new_tokens=16"]
    assert main(["round", str(tmp_path / "runs" / "x"), *words, "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "recipe.options.max_new_tokens is 16, and " in said and "of the worked solutions are longer" in said
    assert "Valid is " in said and not list(tmp_path.iterdir())


def test_the_image_of_a_campaign_is_not_made_either(tmp_path):
    chosen = settings.compose([*GRPO, "recipe.options.max_new_tokens=16"])
    with pytest.raises(ConfigError, match="max_new_tokens is 16"):
        init.build_image(chosen, tmp_path / "substrate.sqsh")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def payload(tmp_path_factory) -> Path:
    """The checkout's own code and base, with some solved puzzles."""
    folder = tmp_path_factory.mktemp("solved") / "payload"
    families = ("roman", "unit_conversion", "text_cipher")
    write_payload(folder, seed=1, level="small", num_per_family=8, families=families)
    for name in ("substrate", "base"):
        (folder / name).symlink_to(ROOT / {"base": "substrate/base"}.get(name, name))
    return folder


def test_both_styles_are_looked_at_where_an_axis_moves_them(payload):
    """The reference writes short solutions, which fit; one of the axes' arms would write stepwise ones."""
    short = [*GRPO, "recipe.trace_style=short", "recipe.options.max_new_tokens=28"]
    with pytest.raises(ConfigError, match="are longer"):
        entries.check_solutions(payload, settings.compose(short).to_dict())
    config = settings.compose([*short, "policy/axes=grpo"]).to_dict()
    assert entries.check_solutions(payload, config) == "", "no axis of these moves the style"


def test_without_the_checkpoint_s_tokenizer_nothing_is_claimed(payload):
    named = [*GRPO, "recipe.options.max_new_tokens=16", "model.weights=base/weights.json"]
    assert "is seen where cluster.weights_dir has the checkpoint" in entries.check_solutions(
        payload, settings.compose(named).to_dict()
    )
    assert entries.check_solutions(payload, settings.compose(["experiment=smoke"]).to_dict()) == ""
