"""Test settings: composed ones are typed, frozen ones are read back, and every fault is one sentence that names the key."""

import re
from functools import reduce
from operator import getitem
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.campaign.errors import ConfigError
from pipeline.config import settings

DEFAULT = settings.compose()


def leaves(tree: dict, prefix: str = "") -> list[str]:
    """Dotted keys of all values that are no mappings."""
    inner = [
        leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
        for key, value in tree.items()
    ]
    return [key for keys in inner for key in keys]


KEYS = leaves(DEFAULT.to_dict())


EXPERIMENTS = sorted(path.stem for path in (settings.SOURCE / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("experiment", ["", *EXPERIMENTS])
def test_frozen_settings_are_read_back_equal(tmp_path, experiment):
    """In every type too, because the process that writes the text takes the settings that it has for what the text reads as."""
    chosen = settings.compose([f"experiment={experiment}", "recipe.learning_rate=1e-3"] if experiment else [])
    path = tmp_path / "config.yaml"
    path.write_text(settings.to_yaml(chosen))
    read = settings.load(path)
    assert read == chosen and repr(read) == repr(chosen)
    assert settings.to_yaml(read) == path.read_text() == settings.remembered(chosen)
    assert repr(settings.load(path)) == repr(chosen)
    settings.load(path).recipe.num_steps = 0
    assert settings.load(path) == chosen


def test_overrides_are_composed_and_typed():
    chosen = settings.compose(["experiment=smoke", "recipe.learning_rate=1e-3", "recipe.lora.rank=8", "seed=7"])
    assert (chosen.recipe.learning_rate, chosen.recipe.lora.rank, chosen.seed) == (0.001, 8, 7)
    assert chosen.recipe.num_steps < DEFAULT.recipe.num_steps


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("recipe.lerning_rate=1", "lerning_rate"),
        ("parallelism.tp=0", "parallelism.tp = 0. Valid: an integer of at least 1"),
        ("parallelism.dp=-1", "parallelism.dp = -1"),
        ("recipe.mix.roman=inf", "recipe.mix.roman = inf. Valid: a finite number"),
        ("model.norm_eps=nan", "model.norm_eps = nan"),
        ("tasks.families=[roman,roman]", "each family once"),
        ("+tasks.dev_slices={roman:{question:{low:1,high:1" + "0" * 400 + "}}}", "two finite numbers"),
        ("+tasks.dev_slices={gravity:{g:{low:1,high:2}}}", "tasks.dev_slices = ['gravity']. Valid: families of"),
        (
            "recipe.slice_share=0.5",
            "recipe.slice_share = 0.5. Valid: 0 to 1 where tasks.dev_slices names a slice, else 0",
        ),
        ("campaign.rounds=-1", "campaign.rounds = -1"),
        ("policy.rounds=-1", "policy.rounds = -1"),
        ("external.kind=lottery", "external.kind = lottery. Valid: none, local"),
        ("external=local +external.push=login", "external.push = login. Valid: meta, with external=local"),
        (
            "external=local external.rows=2",
            "external.rows = 2. Valid: at least 3, one of each family, with external=local",
        ),
        ("external=local external.submissions=9", "external.submissions = 9. Valid: 0 to 8"),
        ("external=local external.submissions=0", "external.submissions = 0. Valid: at least 1"),
        ("external=local external.shift=100", "external.shift = 100. Valid: 0 to 99"),
        (
            "external=local external.real_share=0.5",
            "external.real_share = 0.5. Valid: 0 without external=local and tasks",
        ),
        (
            "external=local external.real_share=0.995 tasks.train_csv=x",
            "leaves no generated row or at least one of each",
        ),
        ("external=kaggle external.competition=", "external.competition = empty"),
        ("external=kaggle external.score=best", "external.score = best. Valid: public or private"),
        ("external=kaggle external.timeout_seconds=0", "external.timeout_seconds = 0"),
        ("external=command", "external.command = empty"),
        ("+recipe.colour=red", "colour"),
        ("model=huge", "huge"),
        ("colour=red", "colour"),
        ("experiment=none_such", "none_such"),
        ("recipe.num_steps=many", "many"),
        ("recipe.num_steps=2.5", "2.5"),
        ("recipe=5", "recipe"),
        ("recipe.learning_rate=${nowhere}", "nowhere"),
        ("recipe.learning_rate=???", "recipe.learning_rate"),
        ("=", "="),
        ("recipe.num_steps", "recipe.num_steps"),
        ("~recipe.lora", "lora"),
    ],
)
def test_a_wrong_override_is_named_in_one_sentence(override, named):
    with pytest.raises(ConfigError) as error:
        settings.compose(override.split())
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.cure


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.dtype", "float16"),
        ("tasks.level", "hard"),
        ("tasks.families", []),
        ("cluster.kind", "cloud"),
        ("cluster.arms_at_once", -1),
        ("cluster.time_limit_minutes", 0),
        ("recipe.mix", {"equation": 1.0}),
        ("recipe.mix", {}),
        ("recipe.mix", {"roman": -1.0, "unit_conversion": 2.0}),
        ("recipe.mix", {"roman": 0.0}),
        ("recipe.learning_rate", 0),
        ("recipe.learning_rate", float("nan")),
        ("recipe.num_steps", 0),
        ("recipe.batch_size", -4),
        ("recipe.micro_batch_tokens", 0),
        ("recipe.sequence_length", 513),
        ("recipe.lora.dropout", 1),
        ("recipe.lora.rank", 33),
        ("recipe.lora.rank", 0),
        ("tasks.num_fresh_per_family", 0),
        ("tasks.max_new_tokens", 0),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_valid(key, value):
    config = DEFAULT.to_dict()
    *path, last = key.split(".")
    reduce(getitem, path, config)[last] = value
    with pytest.raises(ConfigError, match=rf"^{key} = .*\. Valid: "):
        settings.typed(config)


def test_settings_with_overrides_change_one_key_and_leave_the_original():
    before = str(DEFAULT.recipe.learning_rate)
    changed = settings.with_overrides(DEFAULT, [("recipe.learning_rate", "0.0071"), ("recipe.lora.rank", "8")])
    assert (changed.recipe.learning_rate, changed.recipe.lora.rank) == (0.0071, 8)
    assert settings.with_overrides(changed, [("recipe.learning_rate", before), ("recipe.lora.rank", "16")]) == DEFAULT
    assert DEFAULT == settings.compose()


@hypothesis.settings(max_examples=20)
@given(
    st.sampled_from(KEYS),
    st.text(max_size=8) | st.sampled_from(["1", "0.5", "-1", "???", "${seed}", "${x", "null", "true"]),
)
def test_any_text_for_any_key_is_taken_or_refused(key, text):
    try:
        changed = settings.with_overrides(DEFAULT, [(key, text)])
    except ConfigError as error:
        assert "\n" not in error.what
    else:
        assert leaves(changed.to_dict()) == KEYS


@pytest.mark.parametrize(
    "key",
    ["", "colour", "recipe.colour", "recipe.lora.rank.deep", "recipe..lora", "recipe.lora.targets.0", "recipe.mix.new"],
)
def test_a_key_that_does_not_exist_is_named(key):
    with pytest.raises(ConfigError, match="is not a configuration key"):
        settings.value_of(DEFAULT, key)
    with pytest.raises(ConfigError, match="is not a configuration key"):
        settings.with_overrides(DEFAULT, [(key, "1")])


def test_values_are_text():
    assert settings.value_of(DEFAULT, "recipe.lora.rank") == "16"
    assert settings.value_of(DEFAULT, "recipe.clip_norm") == "1.0"


def test_the_rounds_of_a_campaign_are_found(tmp_path):
    rounds = tmp_path / "hydra" / "round"
    rounds.mkdir(parents=True)
    standing = "policy: {standing: [{key: recipe.lora.rank, value: '8'}], dead_ends: [{key: recipe.schedule, value: SquareAnnealing}]}"
    (rounds / "r0002.yaml").write_text(f"# @package _global_\nround: r0002\n{standing}\n")
    chosen = settings.compose(["+round=r0002"], campaign_dir=tmp_path)
    policy = settings.policy_of(chosen)
    assert chosen.round == "r0002"
    assert policy.standing == (("recipe.lora.rank", "8"),)
    assert policy.dead_ends == (("recipe.schedule", "SquareAnnealing"),)
    assert policy.axes == settings.policy_of(DEFAULT).axes
    with pytest.raises(ConfigError, match="r0003"):
        settings.compose(["+round=r0003"], campaign_dir=tmp_path)


def test_composing_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings.compose(["experiment=smoke"])
    assert list(Path(tmp_path).iterdir()) == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("recipe.num_step=3", "there is no setting recipe.num_step. Similar settings: recipe.num_steps"),
        ("recipe.mix.romans=1", "Similar settings: recipe.mix.roman"),
        (
            "wholly.unknown=1",
            "Valid at the top: campaign, cluster, experiment, external, model, parallelism, policy, recipe, seed, tasks",
        ),
        ("recipe=sft", "Valid: grpo, rft, sft_full, sft_lora"),
        ("recipe=grop", "Did you mean recipe=grpo?"),
        ("reciep=grpo", "there is no setting reciep. Similar settings: recipe. Valid at the top: "),
        ("recpie.num_steps=3", "Similar settings: recipe.num_steps, "),
        ("+foo=3", "there is no setting foo. Valid at the top: "),
        ("++recipe.foo=1", "there is no setting recipe.foo. "),
        ("external.command=[x]", "Choose a file of hydra_conf/external/ that has it"),
    ],
)
def test_a_misspelt_key_has_its_neighbours_told(override, said):
    with pytest.raises(ConfigError) as refused:
        settings.compose([override])
    assert said in str(refused.value) and "searchpath" not in str(refused.value) and "+recipe" not in str(refused.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "cluster.setup='module load x'",
            "cluster.setup = module load x. Valid: a list in brackets, also of one entry: 'cluster.setup=[\"...\"]'",
        ),
        ("tasks.families=roman", "tasks.families = roman. Valid: a list in brackets"),
        (
            "cluster.time_limit_minutes=1.5",
            "cluster.time_limit_minutes = 1.5. Valid: whole minutes, or a time in quotes as sbatch reads it",
        ),
        ("cluster.meta.time_limit_minutes=2.5", "cluster.meta.time_limit_minutes = 2.5. Valid: whole minutes"),
        ("cluster.time_limit_minutes=true", "cluster.time_limit_minutes = True. Valid: whole minutes"),
        ("recipe.num_steps=2.5", "recipe.num_steps = 2.5. Valid: a whole number"),
        ("recipe.num_steps=", "recipe.num_steps = nothing. Valid: a whole number"),
        ("campaign.auto=maybe", "campaign.auto = maybe. Valid: true or false"),
        ("recipe.mix.roman=x", "recipe.mix.roman = x. Valid: a number"),
        ("recipe.mix={roman:[1]}", "recipe.mix.roman = [1]. Valid: a number"),
        ("recipe.mix=[1]", "recipe.mix=[1]. Valid: names and values"),
        ("recipe.lora=3", "recipe.lora = 3. Valid: keys and values, of rank, alpha, dropout, targets"),
        ("cluster.partition=[a,b]", "cluster.partition = ['a', 'b']. Valid: one text"),
        (
            "cluster.partition=gpu,cpu",
            "a comma separates values of a sweep. As one text: \"cluster.partition='gpu,cpu'\"",
        ),
        ("recipe=3", "recipe=3: a group takes the name of a file"),
        ("~recipe", "recipe has no value. Valid: keys and values, of method"),
        ("cluster.partition", "cluster.partition cannot be read as KEY=VALUE"),
        ("a=b=c", "a=b=c cannot be read as KEY=VALUE"),
    ],
)
def test_what_hydra_and_omegaconf_refuse_is_said_in_our_words(override, said):
    with pytest.raises(ConfigError) as refused:
        settings.compose([override])
    text = str(refused.value)
    assert said in text, text
    assert not re.search("AnyNode|ListConfig|full_key|reference_type|object_type|Structured|hydra.cc", text)


def test_a_credential_in_a_setting_of_another_type_is_not_shown():
    with pytest.raises(ConfigError) as refused:
        settings.compose(["policy=llm", "policy.proposals.timeout_seconds=my-own-password"])
    assert "password" not in str(
        refused.value
    ) and "policy.proposals.timeout_seconds = .... Valid: a whole number" in str(refused.value)
