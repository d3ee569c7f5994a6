"""Test that every shipped configuration composes, is typed, and fits if it says so."""

import shutil
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest

from pipeline.campaign.errors import ConfigError
from pipeline.config import fit, model_size, settings
from substrate.recipes import load_recipe

FILES = sorted(path.relative_to(settings.SOURCE) for path in settings.SOURCE.rglob("*.yaml"))
GROUPS = {path.parent.as_posix() for path in FILES if len(path.parts) > 1}


@cache
def composed(path: Path) -> settings.Settings:
    """The whole configuration with this file chosen for its group."""
    if path == Path("campaign.yaml"):
        return settings.compose()
    group, option = path.parent.as_posix(), path.stem
    if group == "sampling":  # chosen by the two that it is named after
        model, _, recipe = option.rpartition("_")
        return settings.compose([f"model={model}", f"recipe={recipe}"])
    needs = {
        "external/command": ["external.command=[score]"],  # what only a site can say
        "worker/served": ["cluster.vllm_runtime=/shared/vllm", "worker.server.weights_dir=/shared/weights"],
        "policy/axes/nano": ["experiment=nano_30b"],  # factors of its recipe's values
        "policy/axes/grpo": ["recipe=grpo"],
    }
    return settings.compose([f"{group}={option}", *needs.get(f"{group}/{option}", [])])


def files(*groups: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", [path for path in FILES if path.parent.as_posix() in groups], ids=str)


def test_the_files_were_found():
    assert len(FILES) >= 20
    assert {path.parent.as_posix() for path in FILES} == GROUPS | {"."}
    groups = {
        "arm",
        "cluster",
        "experiment",
        "external",
        "model",
        "parallelism",
        "policy",
        "recipe",
        "sampling",
        "tasks",
        "worker",
    }
    assert GROUPS == groups | {"policy/axes"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_composes_and_validates(path):
    model_size.check_model(composed(path).to_dict()["model"])


@files("experiment", "tasks", "policy", "recipe", "sampling")
def test_file_makes_a_plan_that_fits(path):
    fit.check_plan_fits(composed(path))


@pytest.mark.parametrize(("experiment", "method"), [("nano_30b", "grpo"), ("nano_30b", "rft"), ("nano_mini", "grpo")])
def test_what_a_model_samples_fits_the_experiment_that_ships_for_it(experiment, method):
    chosen = settings.compose([f"experiment={experiment}", f"recipe={method}"])
    assert (settings.SOURCE / "sampling" / f"{chosen.model.name}_{method}.yaml").exists()
    layout = chosen.parallelism
    load_recipe(chosen.to_dict()["recipe"]).check_layout(layout.pp, layout.dp)


def test_an_experiment_of_any_name_has_what_its_model_samples_and_its_own_values_win(tmp_path):
    source = shutil.copytree(settings.SOURCE, tmp_path / "hydra_conf")
    text = (source / "experiment" / "nano_30b.yaml").read_text()
    (source / "experiment" / "mine.yaml").write_text(text)
    (source / "experiment" / "longer.yaml").write_text(f"{text}  options: {{max_new_tokens: 2048}}\n")
    shipped, mine, longer, typed = (
        settings.compose([f"experiment={name}", "recipe=grpo", *words], source).recipe
        for name, words in (
            ("nano_30b", []),
            ("mine", []),
            ("longer", []),
            ("longer", ["recipe.options.max_new_tokens=3000"]),
        )
    )
    assert mine == shipped and mine.options["max_new_tokens"] == 1024
    assert longer.options == shipped.options | {"max_new_tokens": 2048}
    assert typed.options["max_new_tokens"] == 3000


@files("cluster")
def test_cluster_runs_the_experiment_of_its_size(path):
    chosen = composed(path)
    experiment = "nano_30b" if chosen.cluster.gpus_per_node else "demo"
    fit.check_plan_fits(replace(composed(Path("experiment", f"{experiment}.yaml")), cluster=chosen.cluster))
    assert chosen.cluster.signal_lead_seconds < 60 * chosen.cluster.time_limit_minutes


def options(group: str) -> list[str]:
    return [path.stem for path in FILES if path.parent.as_posix() == group]


@cache
def size_of(option: str) -> int:
    """Parameters of the model that a choice such as model=tiny or experiment=demo brings."""
    return model_size.num_parameters(settings.compose([option]).to_dict()["model"])


@pytest.mark.parametrize("experiment,model", list(product(options("experiment"), options("model"))))
def test_every_experiment_and_model_and_recipe_have_a_verdict(experiment, model):
    """A model of another size is refused, and the cure is a choice that is taken; every other combination is taken, with each recipe."""
    ratio = size_of(f"model={model}") / size_of(f"experiment={experiment}")
    is_far = not 1 / fit.OTHER_SIZE <= ratio <= fit.OTHER_SIZE
    for recipe in options("recipe"):
        words = [f"experiment={experiment}", f"model={model}", f"recipe={recipe}"]
        if not is_far:
            fit.check_experiment(settings.compose(words), words)
            continue
        with pytest.raises(ConfigError) as refused:
            fit.check_experiment(settings.compose(words), words)
        for cure in [word for word in refused.value.cure.replace(",", "").split() if word.startswith("experiment=")]:
            fitting = [cure, f"model={model}"]
            fit.check_experiment(settings.compose(fitting), fitting)


def test_the_30b_without_its_experiment_is_told_the_experiment_and_may_have_a_rate_of_its_own():
    words = ["model=nemotron3_nano_30b", "cluster=slurm"]
    with pytest.raises(
        ConfigError, match="31,577.9 million parameters, but experiment=demo .* Choose experiment=nano_30b, "
    ):
        fit.check_experiment(settings.compose(words), words)
    own = [*words, "recipe.learning_rate=2e-4"]
    fit.check_experiment(settings.compose(own), own)
    sized = ["model.hidden_size=128", "recipe.lora.rank=8"]  # within the factor of the axes
    fit.check_experiment(settings.compose(sized), sized)


def test_the_default_experiment_is_the_one_that_campaign_yaml_chooses():
    assert settings.compose() == settings.compose([f"experiment={fit.DEFAULT_EXPERIMENT}"])


def test_experiments_and_recipes_that_are_chosen_together_fit():
    for experiment, recipe in product(options("experiment"), options("recipe")):
        words = [f"experiment={experiment}", f"recipe={recipe}"]
        fit.check_experiment(settings.compose(words), words)
