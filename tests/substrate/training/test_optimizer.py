"""Test the optimizers: NeMo's classes under NeMo's names, their moments, and runs that resume to the last bit."""

import warnings

import pytest
import torch
from safetensors import safe_open

import substrate.model  # noqa: F401  before NeMo, which imports megatron-core too: substrate/distributed/cpu.py
from pipeline.config.model_size import MOMENTS
from substrate.interface.errors import Stopped, UsageError
from substrate.recipes import load_recipe
from substrate.training.optimizer import OPTIMIZERS, allocate, make_optimizer, moments
from tests.support import trainings

# megatron-core 0.16.1 calling itself in ways that it deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]


def _stepped(name: str, steps: int) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    """A parameter that learns from the same gradients in every call, and its optimizer after `steps` steps."""
    tensor = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = make_optimizer(name, [tensor], weight_decay=0.01)
    for step in range(steps):
        _step(optimizer, tensor, step)
    return tensor, optimizer


def _step(optimizer: torch.optim.Optimizer, tensor: torch.nn.Parameter, step: int) -> None:
    optimizer.param_groups[0]["lr"] = 0.1
    tensor.grad = torch.randn(3, 2, generator=torch.Generator().manual_seed(step))
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_name_is_the_class_that_nemo_registers_and_keeps_as_many_moments_as_forecast(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS
    tensor, optimizer = _stepped(name, 1)
    assert type(optimizer) is AVAILABLE_OPTIMIZERS[name]
    found = moments(optimizer, tensor)
    assert len(found) == MOMENTS[name] and MOMENTS.keys() == OPTIMIZERS.keys()
    assert all(moment.shape == tensor.shape for moment in found.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_and_the_number_of_steps_are_all_that_an_optimizer_remembers(name):
    tensor, optimizer = _stepped(name, 3)
    other, resumed = _stepped(name, 0)
    allocate(resumed, 3)
    with torch.no_grad():
        other.copy_(tensor)
        for key, moment in moments(resumed, other).items():
            moment.copy_(moments(optimizer, tensor)[key])
    for step in (3, 4):
        _step(optimizer, tensor, step)
        _step(resumed, other, step)
    assert torch.equal(other, tensor) and not torch.equal(tensor, torch.ones(3, 2))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stopped_run_goes_on_to_the_same_adapter(alone, inputs, tmp_path, monkeypatch, name):
    changes = {"optimizer": name, "learning_rate": 1e-3, "num_steps": 6}
    whole = trainings.train(trainings.write_task(tmp_path / "whole", inputs, **changes), alone)
    task = trainings.write_task(tmp_path / "stopped", inputs, **changes)
    with monkeypatch.context() as patch:
        trainings.stop_after(patch, 4, tmp_path / "stopped" / "stop")
        with pytest.raises(Stopped):
            trainings.train(task, alone)
    (tmp_path / "stopped" / "stop").unlink()
    with safe_open(tmp_path / "stopped/out/checkpoints/step_000004/state-00000-00000.safetensors", "pt") as file:
        prefixes = {key.partition("/")[0] for key in file.keys() if "/" in key}  # noqa: SIM118  not a dict
    assert len(prefixes) == MOMENTS[name] + 1 and "random" in prefixes
    assert trainings.adapter(trainings.train(task, alone)) == trainings.adapter(whole)


def test_another_optimizer_is_refused_by_both_sides():
    from pipeline.campaign.errors import ConfigError
    from pipeline.config import settings

    shipped = trainings.config("recipe", "sft_lora")
    with pytest.raises(UsageError, match=r"recipe.optimizer is 'adafactor'; valid is one of adamw, adam, adamax, adan"):
        load_recipe(shipped | {"optimizer": "adafactor"})
    with pytest.raises(ConfigError, match="recipe.optimizer = adafactor"):
        settings.compose(["recipe.optimizer=adafactor"])
