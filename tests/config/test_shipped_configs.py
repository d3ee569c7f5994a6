"""Test that every shipped configuration composes, is typed, and fits if it says so."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from pipeline.config import fit, model_size, settings

FILES = sorted(path.relative_to(settings.SOURCE) for path in settings.SOURCE.rglob("*.yaml"))
GROUPS = {path.parent.as_posix() for path in FILES if len(path.parts) > 1}


@cache
def composed(path: Path) -> settings.Settings:
    """The whole configuration with this file chosen for its group."""
    if path == Path("campaign.yaml"):
        return settings.compose()
    group, option = path.parent.as_posix(), path.stem
    if group == "sampling":  # chosen by the two that it is named after
        experiment, _, recipe = option.rpartition("_")
        return settings.compose([f"experiment={experiment}", f"recipe={recipe}"])
    needs = {
        "external/command": ["external.command=[score]"],  # what only a site can say
        "policy/axes/nano": ["experiment=nano_30b"],  # factors of its recipe's values
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
    }
    assert GROUPS == groups | {"policy/axes"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_composes_and_validates(path):
    model_size.check_model(composed(path).to_dict()["model"])


@files("experiment", "tasks", "policy", "recipe", "sampling")
def test_file_makes_a_plan_that_fits(path):
    fit.check_plan_fits(composed(path))


@files("cluster")
def test_cluster_runs_the_experiment_of_its_size(path):
    chosen = composed(path)
    experiment = "nano_30b" if chosen.cluster.gpus_per_node else "demo"
    fit.check_plan_fits(replace(composed(Path("experiment", f"{experiment}.yaml")), cluster=chosen.cluster))
    assert chosen.cluster.signal_lead_seconds < 60 * chosen.cluster.time_limit_minutes
