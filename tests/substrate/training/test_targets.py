"""Test that a target which no gradient reaches fails at the first step, by its name, on any layout, and that nothing else does."""

import json

import pytest
import torch
import torch.nn.functional as F

from substrate.interface.errors import Stopped, UsageError
from substrate.model import add_lora, build_model, init_weights, learning_targets, token_log_probs
from substrate.model.full import FullDelta
from substrate.model.lora import TARGETS, Adapter, adapters
from substrate.recipes.grpo import Grpo, PolicyBatch
from substrate.recipes.sft_lora import SftLora
from tests.support import trainings
from tests.support.reference import small_config

# megatron-core 0.16.1 calling itself in ways that it deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]
EVERY = [target for target in TARGETS if target != "lm_head"]
# A rank whose layers of one target compute with the weight alone, as a fused kernel does that reads `layer.weight`.
BYPASS = """
import sys
import torch.nn.functional as F
from substrate import train
from substrate.interface.errors import exit_code_of
from substrate.model.lora import Adapter
forward = Adapter.forward
Adapter.forward = lambda self, x: F.linear(x, self.base.tensor) if TARGET in self.active[0] else forward(self, x)
sys.exit(exit_code_of(train.main))
"""


def lora(*targets: str) -> dict:
    return {"lora": trainings.config("recipe", "sft_lora")["lora"] | {"targets": list(targets) or EVERY}}


def bypass(monkeypatch, *targets: str, of: type[Adapter] = Adapter) -> None:
    forward = of.forward

    def bypassing(self, x):
        hit = any(f".{target}." in name for target in targets for name in self.active)
        return F.linear(x, self.base.tensor) if hit else forward(self, x)

    monkeypatch.setattr(of, "forward", bypassing)


@pytest.mark.parametrize("target", ["in_proj", "o_proj", "shared_experts.up_proj", "experts"])
def test_case_10_a_target_that_a_kernel_bypasses_fails_at_the_first_step(alone, inputs, tmp_path, monkeypatch, target):
    bypass(monkeypatch, target)
    with pytest.raises(UsageError) as failed:
        trainings.train(trainings.write_task(tmp_path, inputs, **lora()), alone)
    named = "experts.down_proj, experts.up_proj" if target == "experts" else target
    assert str(failed.value).startswith(f"no gradient reaches the LoRA target {named} in step 1, in any layer")
    assert "leave it out of recipe.lora.targets" in str(failed.value) and failed.value.exit_code == 64
    assert [line["phase"] for line in trainings.progress(tmp_path / "out")] == ["start"]
    assert not (tmp_path / "out" / "adapter").exists()


def test_case_10_one_module_of_a_fused_matrix_is_named_alone(alone, inputs, tmp_path, monkeypatch):
    """q, k and v are one matrix: only the rows of k get no gradient."""
    cast = Adapter._cast

    def without_k(self, dtype):
        keys = [name.endswith("k_proj.weight") for name in self.base.names]
        if any(keys):
            self.mask_OR[torch.tensor(keys)[self.base.local_parts()]] = 0
        return cast(self, dtype)

    monkeypatch.setattr(Adapter, "_cast", without_k)
    with pytest.raises(UsageError, match="LoRA target k_proj in step 1"):
        trainings.train(trainings.write_task(tmp_path, inputs, **lora("q_proj", "k_proj", "v_proj")), alone)


def test_case_10_a_model_without_any_gradient_is_told_and_not_a_crash(alone, inputs, tmp_path, monkeypatch):
    bypass(monkeypatch, "q_proj", "in_proj")
    with pytest.raises(UsageError, match="LoRA target in_proj, q_proj in step 1"):
        trainings.train(trainings.write_task(tmp_path, inputs, **lora("q_proj", "in_proj")), alone)


def test_case_10_whole_weights_are_watched_as_well(alone, inputs, tmp_path, monkeypatch):
    bypass(monkeypatch, "out_proj", of=FullDelta)
    full = {"method": "sft_full", "lora": lora("out_proj", "q_proj")["lora"] | {"dropout": 0.0}}
    with pytest.raises(UsageError, match="LoRA target out_proj in step 1"):
        trainings.train(trainings.write_task(tmp_path, inputs, **full), alone)


def test_case_10_a_batch_that_teaches_nothing_proves_nothing(alone, inputs, tmp_path, monkeypatch):
    """The first rollout of grpo may have equal rewards; the question is then put to the next step."""
    asked = []
    monkeypatch.setattr(SftLora, "teaches", lambda self, batch: asked.append(batch) or len(asked) > 2)
    bypass(monkeypatch, "q_proj")
    with pytest.raises(UsageError, match="LoRA target q_proj in step 3"):
        trainings.train(trainings.write_task(tmp_path, inputs, **lora("q_proj")), alone)


def test_case_10_equal_rewards_teach_nothing():
    def batch(*advantages: float):
        zeros = torch.zeros(1, 1)
        part = [PolicyBatch(zeros, zeros, zeros, [], [], torch.tensor([[each]]), zeros, zeros) for each in advantages]
        return type("Batch", (), {"micro_batches": part})

    assert not Grpo.teaches(None, batch(0.0, 0.0))
    assert Grpo.teaches(None, batch(0.0, -0.5))
    assert Grpo.teaches(None, type("Batch", (), {"micro_batches": ["a worked solution"]}))


def test_case_10_experts_without_tokens_are_no_fault(alone):
    """Two tokens reach two of eight experts; the target is judged over all of them."""
    model = build_model(small_config(num_experts=8, moe_top_k=1), alone)
    init_weights(model, seed=1)
    add_lora(model, 4, 8, 0.0, list(TARGETS), seed=3)
    tokens = torch.tensor([[5, 9]])
    (-token_log_probs(model, tokens, tokens).sum()).backward()
    alone.finalize_gradients(model)
    idle = [each for each in adapters(model) if ".experts." in each.active[0] and not each.B_OR.grad.any()]
    assert len(idle) >= 12
    assert learning_targets(model) == dict.fromkeys(TARGETS, True)


def test_case_10_the_first_factor_counts_where_the_second_is_trained_already(alone):
    """As in an adapter that is trained on: with A zero and B not, the gradient is A's."""
    model = build_model(small_config(), alone)
    init_weights(model, seed=1)
    add_lora(model, 4, 8, 0.0, ["in_proj"], seed=3)
    with torch.no_grad():
        for adapter in adapters(model):
            adapter.B_OR.normal_()
            adapter.A_RI.zero_()
    tokens = torch.arange(3, 40).reshape(1, -1)
    (-token_log_probs(model, tokens, tokens).sum()).backward()
    alone.finalize_gradients(model)
    assert not any(adapter.B_OR.grad.any() for adapter in adapters(model))
    assert learning_targets(model) == {"in_proj": True}


def test_case_10_a_run_that_resumes_asks_no_more(alone, inputs, tmp_path, monkeypatch):
    task = trainings.write_task(tmp_path, inputs)
    trainings.stop_after(monkeypatch, 4, tmp_path / "stop")
    with pytest.raises(Stopped):
        trainings.train(task, alone)
    monkeypatch.undo()
    (tmp_path / "stop").unlink()
    monkeypatch.setattr("substrate.training.run.learning_targets", lambda model: pytest.fail("asked again"))
    trainings.train(task, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [pytest.param({"tp": 2, "ep": 1}, marks=pytest.mark.long), {"tp": 2, "ep": 2}, {"pp": 3, "tp": 1}], ids=str
)
def test_case_10_every_rank_of_a_layout_says_the_same(inputs, tmp_path, sizes):
    """The target may be on one stage, or on the experts of one rank; a sound run on the same layout trains."""
    sound, bypassed = (trainings.write_task(tmp_path / name, inputs, **lora()) for name in ("sound", "bypassed"))
    for path in (sound, bypassed):
        content = json.loads(path.read_text())
        content["config"]["parallelism"] |= sizes
        path.write_text(json.dumps(content))
    done = trainings.spawn(["-m", "substrate.train"], sound)
    assert done.returncode == 0, done.stderr
    (tmp_path / "bypassing.py").write_text(BYPASS.replace("TARGET", "'.experts.'"))
    launcher = f"import sys; from substrate.distributed import launch; sys.exit(launch.run_ranks('bypassing', sys.argv[1:], {max(sizes.values())}))"
    done = trainings.spawn(["-c", launcher], bypassed, PYTHONPATH=f"{tmp_path}:{trainings.ROOT}")
    assert done.returncode == 64, done.stderr
    assert "no gradient reaches the LoRA target experts.down_proj, experts.up_proj in step 1" in done.stderr
