"""Test methods and settings: losses against closed forms, samples against the judge's engine, resumed runs to the last bit."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import testing

from substrate.data.batches import Shape, by_row, in_line, make_batch
from substrate.data.rows import Row
from substrate.inference.decode import sample
from substrate.interface.errors import DataError, Stopped, UsageError
from substrate.model.losses import chunked_log_probs
from substrate.recipes import METHODS, load_recipe
from substrate.recipes.base_recipe import Lora
from substrate.recipes.grpo import PolicyBatch, group_advantages
from substrate.recipes.own_samples import check_limit
from substrate.recipes.rft import _best, _filled
from substrate.tasks import FAMILIES
from substrate.training.selection import Selection, Selector
from tests.support import trainings
from tests.support.paths import ROOT

# megatron-core 0.16.1 calling itself in ways that it deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]
ROLLOUTS = {"sft_steps": 4, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 48, "decode_batch_size": 16}
OPTIONS = {
    "sft_lora": {},
    "sft_full": {},
    "rft": {**ROLLOUTS, "num_prompts": 6, "samples_per_prompt": 2, "keep_per_prompt": 1, "learning_rate_scale": 0.5},
    "grpo": {**ROLLOUTS, "samples_per_prompt": 2, "updates_per_rollout": 2, "clip": 0.2, "kl_weight": 0.1}
    | {"learning_rate_scale": 0.5},
}
# A rank that writes down how many completions it decodes and scores.
COUNTING_RANK = """
import json, os, sys
from pathlib import Path
import substrate.train as train
import substrate.training.rollouts as rollouts
from substrate.training.run import Training
counts = {"decoded": [], "scored": []}
decode, log_probs = rollouts.decode, Training.log_probs
def decoding(model, asked, *args, **kwargs):
    counts["decoded"].append(len(asked))
    return decode(model, asked, *args, **kwargs)
def scoring(self, rows, *args):
    outputs, scored = self.recipe.outputs, []
    object.__setattr__(self.recipe, "outputs", lambda m, batch, *rest: scored.append(len(batch.rows)) or outputs(m, batch, *rest))
    found = log_probs(self, rows, *args)
    object.__delattr__(self.recipe, "outputs")
    counts["scored"].append(sum(scored))
    return found
rollouts.decode, Training.log_probs = decoding, scoring
train.main()
out = Path(json.loads(Path(sys.argv[1]).read_text())["paths"]["out"])
(out / f"counted.{os.environ['RANK']}").write_text(json.dumps(counts))
"""
LAUNCHER = """
import json, sys
from pathlib import Path
from substrate.distributed import launch
layout = json.loads(Path(sys.argv[1]).read_text())["config"]["parallelism"]
sys.exit(launch.run_ranks("counting_rank", sys.argv[1:], layout["tp"] * layout["dp"]))
"""
ADVANTAGES = (1.0, -1.0, 0.5, -0.5)
NO_DROPOUT = trainings.config("recipe", "sft_lora")["lora"]


def _recipe(method: str, **changes):
    shipped = trainings.config("recipe", "sft_lora")
    return load_recipe(shipped | {"method": method, "options": OPTIONS[method]} | changes)


def _every_sample_is_right(monkeypatch) -> None:
    """A random model solves nothing: its first sample of a prompt counts as right, so that there is something to keep."""
    from substrate.training import rollouts as rollouts_module

    scored = rollouts_module.Sampler._scored

    def kinder(self, row, ids, log_probs, truncated):
        return scored(self, row, ids, log_probs, truncated)._replace(reward=float(sum(ids) % 2))

    monkeypatch.setattr(rollouts_module.Sampler, "_scored", kinder)


@pytest.mark.parametrize("method", METHODS)
def test_shipped_configuration_is_a_recipe(method):
    from pipeline.config import settings

    chosen = settings.compose([f"recipe={method}"]).to_dict()["recipe"]
    recipe = load_recipe(json.loads(json.dumps(chosen)))
    recipe.check_layout(pp=1, dp=1)
    assert recipe.method == method


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("sft_lora", {"options": {"clip": 1.0}}, "unknown key recipe.options.clip; valid keys are none"),
        ("grpo", {"options": OPTIONS["grpo"] | {"clip": 2.0}}, "recipe.options.clip is 2.0; valid is above 0, below 1"),
        (
            "grpo",
            {"options": OPTIONS["grpo"] | {"sft_steps": 1.5}},
            "recipe.options.sft_steps is 1.5; it must be of type",
        ),
        (
            "grpo",
            {"options": OPTIONS["grpo"] | {"top_p": 0.9}},
            "options.top_p is 0.9; valid is 1: the nucleus changes",
        ),
        ("rft", {"options": OPTIONS["rft"] | {"temperature": 0.0}}, "greedy samples are all equal"),
        ("rft", {"options": OPTIONS["rft"] | {"num_prompts": 0}}, "options.num_prompts is 0; valid is at least 1"),
        ("sft_lora", {"loss_weighting": "loud"}, "one of uniform, per_family, per_row, min_log_prob"),
        ("sft_lora", {"curriculum": "odd"}, "one of shuffled, short_first"),
        ("sft_lora", {"real_share": 1.5}, "recipe.real_share is 1.5; valid is from 0 to 1"),
        ("sft_lora", {"epochs": float("inf")}, "recipe.epochs is inf; it must be a finite number"),
        ("sft_lora", {"mix": {"roman": float("nan")}}, "recipe.mix.roman is nan; it must be a finite number"),
        ("grpo", {"options": OPTIONS["grpo"] | {"kl_weight": float("inf")}}, "recipe.options.kl_weight is inf"),
        (
            "sft_lora",
            {
                "mix": {"roman": 1.0, "text_cipher": 0.0},
                "selection": {"choice": "last", "last_k": 1, "family_weights": {"text_cipher": 1.0}},
            },
            "a weight > 0 of a family with a share",
        ),
        ("sft_lora", {"epochs": -1.0}, "recipe.epochs is -1.0; valid is at least 0"),
        (
            "sft_lora",
            {"selection": {"choice": "best", "last_k": 1, "family_weights": {}}},
            "holdout_per_family is 0; valid is above 0 for `best`",
        ),
        (
            "sft_lora",
            {"selection": {"choice": "first", "last_k": 1, "family_weights": {}}},
            "selection.choice is 'first'; valid is one of last, best, average",
        ),
        (
            "sft_lora",
            {"selection": {"choice": "last", "last_k": 1, "family_weights": {"sudoku": 1.0}}},
            "selection.family_weights is .* valid is families of the mix",
        ),
    ],
)
def test_wrong_knob_is_named(method, changes, message):
    with pytest.raises(UsageError, match=message):
        _recipe(method, **changes)


@pytest.mark.parametrize(
    ("method", "changes", "layout", "message"),
    [
        ("rft", {}, {"pp": 2, "dp": 1}, "pp > 1"),
        ("grpo", {}, {"pp": 2, "dp": 1}, "pp > 1"),
        ("grpo", {"batch_size": 15}, {"pp": 1, "dp": 1}, "a multiple of samples_per_prompt 2"),
        ("grpo", {"num_steps": 4, "warmup_steps": 1}, {"pp": 1, "dp": 1}, "below num_steps"),
        ("grpo", {"lora": NO_DROPOUT | {"dropout": 0.1}}, {"pp": 1, "dp": 1}, "lora.dropout is 0.1; valid is 0"),
    ],
)
def test_layout_that_does_not_serve_is_told_before_anything_starts(method, changes, layout, message):
    with pytest.raises(UsageError, match=message):
        _recipe(method, **changes).check_layout(**layout)


def _batch(weighting: str = "uniform"):
    generator = random.Random(1)
    rows = [
        Row(
            str(n), ("roman", "text_cipher")[n % 2], [5] * (2 + n), [generator.randint(3, 90) for _ in range(3 + n)], ""
        )
        for n in range(4)
    ]
    return make_batch(rows, Shape(100), weighting).micro_batches[0]


@pytest.mark.parametrize("weighting", ["uniform", "per_family", "per_row", "min_log_prob"])
def test_loss_is_the_mean_that_the_weighting_names(weighting):
    batch = _batch(weighting)
    log_probs = -torch.rand(batch.tokens_1L.shape, generator=torch.Generator().manual_seed(1)) * 3
    of_row = {
        row.item_id: values[-len(row.learned) :]
        for row, values in zip(batch.rows, by_row(batch, log_probs), strict=True)
    }
    if weighting == "uniform":
        expected = torch.cat(list(of_row.values())).mean()
    elif weighting == "per_family":
        families = {row.family for row in batch.rows}
        means = [torch.cat([of_row[r.item_id] for r in batch.rows if r.family == family]).mean() for family in families]
        expected = torch.stack(means).mean()
    elif weighting == "per_row":
        expected = torch.stack([line.mean() for line in of_row.values()]).mean()
    else:
        expected = torch.stack([(line * (-line).softmax(0)).sum() for line in of_row.values()]).mean()
    loss = _recipe("sft_lora", loss_weighting=weighting).loss(log_probs, batch)
    testing.assert_close(loss, -expected)


def test_unlikely_tokens_weigh_most_and_weights_carry_no_gradient():
    batch = _batch("min_log_prob")
    log_probs = (-torch.rand(batch.tokens_1L.shape)).requires_grad_()
    _recipe("sft_lora", loss_weighting="min_log_prob").loss(log_probs, batch).backward()
    parts = zip(batch.rows, by_row(batch, log_probs), by_row(batch, log_probs.grad), strict=True)
    for row, values, gradient in parts:
        learned = slice(-len(row.learned), None)
        assert int(gradient[learned].argmin()) == int(values[learned].argmin())
        assert float(gradient.sum()) == pytest.approx(-1 / len(batch.rows))


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=16))
def test_advantages_are_the_standardised_rewards(rewards):
    advantages = group_advantages(rewards)
    assert sum(advantages) == pytest.approx(0, abs=1e-6)
    if len(set(rewards)) == 1:
        assert set(advantages) == {0.0}
    else:
        assert math.fsum(a * a for a in advantages) / len(advantages) == pytest.approx(1, abs=1e-4)
        assert all((a > 0) == (r == 1.0) for a, r in zip(advantages, rewards, strict=True))


def _policy_batch(old_shift: float = 0.0, reference_shift: float = 0.0) -> tuple[torch.Tensor, PolicyBatch]:
    batch = _batch("per_row")
    log_probs = -torch.rand(batch.tokens_1L.shape, dtype=torch.float64) - 0.1
    own = [torch.full((row.num_tokens - 1,), advantage) for row, advantage in zip(batch.rows, ADVANTAGES, strict=True)]
    advantages = in_line(batch, own)
    old, reference = log_probs - old_shift, log_probs - reference_shift
    return log_probs.requires_grad_(), PolicyBatch(*batch, advantages, old.detach(), reference.detach())


def test_policy_gradient_at_the_old_policy_is_that_of_reinforce():
    """d loss / d log pi = -A / (|o| G) where the ratio is 1 and the reference is the policy itself."""
    log_probs, batch = _policy_batch()
    _recipe("grpo").loss(log_probs, batch).backward()
    testing.assert_close(log_probs.grad, (-batch.advantages_1L * batch.weights_1L).double())


@pytest.mark.parametrize(("shift", "gain"), [(0.5, [True, False]), (-0.5, [False, True])])
def test_clipping_stops_the_gradient_where_the_ratio_went_far_enough(shift, gain):
    """Ratio e^0.5: no more for positive advantages. Ratio e^-0.5: no more for negative ones."""
    log_probs, batch = _policy_batch(old_shift=shift)
    own = {"options": OPTIONS["grpo"] | {"kl_weight": 0.0}}
    _recipe("grpo", **own).loss(log_probs, batch).backward()
    for row, advantage in zip(by_row(batch, log_probs.grad), ADVANTAGES, strict=True):
        stopped = gain[0] if advantage > 0 else gain[1]
        assert bool((row == 0).all()) == stopped


def test_divergence_is_zero_at_the_reference_and_positive_elsewhere():
    recipe = _recipe("grpo")
    here, at_reference = _policy_batch()
    off_reference = at_reference._replace(reference_1L=at_reference.reference_1L - 0.7)
    divergence = 0.1 * (math.exp(-0.7) + 0.7 - 1)
    difference = recipe.loss(here, off_reference) - recipe.loss(here, at_reference)
    assert float(difference.detach()) == pytest.approx(divergence, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_ratios_and_gradient_are_those_of_the_distribution_that_was_sampled(alone, temperature):
    """One token of five, against closed forms: E[pi / pi_old] = 1, and the gradient is that of the expected advantage.

    Draws at even distances stand for the expectation. p = softmax(z / T), J = sum_k p_k A_k, so
    dJ / dz_k = p_k (A_k - J) / T.
    """
    num = 20_000
    logits, moved = torch.tensor([1.0, 0.2, -0.5, 2.0, 0.0]), torch.tensor([0.4, 0.5, -0.1, 1.2, 0.3])
    advantage_of = torch.tensor([1.0, -1.0, 0.5, -0.25, 2.0])
    draws = (torch.arange(num) + 0.5) / num
    tokens, recorded = sample((logits / temperature).expand(num, -1), 1.0, draws)
    layer = SimpleNamespace(enter=lambda hidden: hidden, adapter=None, weight=torch.eye(5), tp_group=alone.groups.tp)

    def scored(z, at):
        return chunked_log_probs(layer, z.repeat(1, num, 1), tokens.unsqueeze(1), temperature=at)

    old = scored(logits, temperature)
    testing.assert_close(old[:, 0], recorded.float(), rtol=0, atol=1e-6)
    mean_ratio = (scored(moved, temperature) - old).exp().mean()
    assert float(mean_ratio) == pytest.approx(1, abs=1e-3)
    untempered = (scored(moved, 1.0) - scored(logits, 1.0)).exp().mean()
    assert (abs(float(untempered) - 1) < 0.02) == (temperature == 1)

    z = logits.clone().requires_grad_()
    rows = [Row(str(n), "roman", [1], [int(token)], "") for n, token in enumerate(tokens)]
    weights, advantages = torch.full((num, 1), 1 / num), advantage_of[tokens].unsqueeze(1)
    batch = PolicyBatch(tokens.unsqueeze(1), tokens.unsqueeze(1), weights, rows, [1] * num, advantages, old, old)
    _recipe("grpo").loss(scored(z, temperature), batch).backward()
    p = (logits / temperature).softmax(-1)
    testing.assert_close(-z.grad, p * (advantage_of - p @ advantage_of) / temperature, rtol=0, atol=1e-3)


def test_a_rollout_is_scored_at_its_temperature_and_a_worked_solution_at_one(alone, inputs, tmp_path, monkeypatch):
    """The engine's record and the trainer's scores agree in a run at temperature 0.6, and the ratio begins at one."""
    _every_sample_is_right(monkeypatch)
    options = OPTIONS["grpo"] | {"temperature": 0.6, "updates_per_rollout": 1, "kl_weight": 0.0}
    changes = {"method": "grpo", "lora": NO_DROPOUT}
    out = trainings.train(trainings.write_task(tmp_path / "warm", inputs, options=options, **changes), alone)
    lines = trainings.progress(out)
    rollouts = [line for line in lines if line["phase"] == "rollout"]
    assert len(rollouts) == 6 and all(line["log_prob_difference"]["max"] < 1e-3 for line in rollouts)
    plain = trainings.train(
        trainings.write_task(tmp_path / "plain", inputs, options=options | {"temperature": 1.0}, **changes), alone
    )
    warm, at_one = (
        [line for line in found if line["phase"] == "train"] for found in (lines, trainings.progress(plain))
    )
    assert [line["loss"] for line in warm[:4]] == [line["loss"] for line in at_one[:4]]  # on worked solutions
    # With every ratio 1 the loss is minus the mean advantage, which is 0 in every group.
    assert [line["loss"] for line in warm[4:]] == pytest.approx([0.0] * 6, abs=1e-5)


def _sample(ids: list[int], reward: float) -> SimpleNamespace:
    return SimpleNamespace(ids=ids, reward=reward)


def test_shortest_different_right_samples_are_kept():
    group = [
        _sample([9, 9, 2], 1.0),
        _sample([5, 2], 1.0),
        _sample([5, 2], 1.0),
        _sample([2], 0.0),
        _sample([7] * 9, 1.0),
    ]
    assert [one.ids for one in _best(group, 5, longest=8)] == [[5, 2], [9, 9, 2]]
    assert [one.ids for one in _best(group, 1, longest=8)] == [[5, 2]]


def test_family_without_a_right_sample_goes_on_with_its_worked_solutions():
    coming = [Row(f"{family}{n}", family, [1], [2], "") for n in range(6) for family in ("roman", "text_cipher")]
    kept = [Row("kept", "roman", [1], [3, 2], "")]
    rows = _filled(kept, coming)
    assert len(rows) == len(coming)
    assert {row.item_id for row in rows if row.family == "roman"} == {"kept"}
    assert {row.item_id for row in rows if row.family == "text_cipher"} == {f"text_cipher{n}" for n in range(6)}


def test_family_that_comes_only_once_is_not_missed():
    """Seen as a division by zero: a share so small that the rows to come have none of it, or one."""
    coming = [Row(f"roman{n}", "roman", [1], [2], "") for n in range(30)] + [Row("rare", "text_cipher", [1], [2], "")]
    kept = [Row("kept", "text_cipher", [1], [3, 2], ""), Row("own", "roman", [1], [3, 2], "")]
    assert [row.item_id for row in _filled(kept, coming)] == ["own"] * 30 + ["kept"]
    assert [row.item_id for row in _filled(kept, coming[:30])] == ["own"] * 30


def test_solutions_that_are_longer_than_a_completion_may_be_are_told_and_refused_where_they_are_most():
    lengths, shares = {"roman": [20, 21], "gravity": [800, 64], "equation": []}, {"roman": 1.0, "gravity": 1.0}
    check_limit(lengths, shares, 800, refuses=True)
    with pytest.warns(
        RuntimeWarning, match=r"max_new_tokens is 64, and 25% of .* \(gravity 50%\); .* valid is 800, the"
    ):
        check_limit(lengths, shares, 64, refuses=True)
    with pytest.raises(DataError, match=r"max_new_tokens is 20, and 75% of .* longer \(gravity 100%, roman 50%\)"):
        check_limit(lengths, shares, 20, refuses=True)
    with pytest.warns(RuntimeWarning, match="is 20, and 75%"):  # the model is not taught them
        check_limit(lengths, shares, 20, refuses=False)
    with pytest.warns(RuntimeWarning, match="is 20, and 55%"):  # half of nine tenths, and all of one
        check_limit(lengths, {"roman": 0.9, "gravity": 0.1}, 20, refuses=False)


@pytest.mark.parametrize("method", ["rft", "grpo"])
def test_a_run_whose_samples_must_all_be_cut_ends_before_the_model_is_built(alone, inputs, tmp_path, method):
    options = OPTIONS[method] | {"max_new_tokens": 16}
    task = trainings.write_task(tmp_path, inputs, method=method, options=options, lora=NO_DROPOUT)
    with pytest.raises(DataError, match=r"max_new_tokens is 16, and [0-9]+% of the worked solutions are longer"):
        trainings.train(task, alone)


@pytest.mark.parametrize("method", ["rft", "grpo"])
def test_the_30b_s_samples_may_be_as_long_as_the_full_level_s_solutions(method):
    """In characters, of which a tokenizer makes at most as many tokens; 64 for the boxed answer."""
    from pipeline.config import settings

    chosen = settings.compose(["experiment=nano_30b", f"recipe={method}", "cluster=slurm_pyxis"])
    options, recipe = chosen.recipe.options, chosen.recipe
    generator = random.Random(1)
    for name in chosen.tasks.families:
        rules = FAMILIES[name]
        traces = [rules.trace(rules.generate(generator, "full"), "stepwise") for _ in range(50)]
        assert max(map(len, traces)) + 64 <= options["max_new_tokens"] <= chosen.tasks.max_new_tokens
    assert 0 < options["sft_steps"] < recipe.num_steps and recipe.learning_rate < 1e-3


def test_no_right_sample_at_all_is_told(alone, inputs, tmp_path):
    task = trainings.write_task(tmp_path, inputs, method="rft", options=OPTIONS["rft"])
    with pytest.raises(DataError, match=r"none of 12 samples was correct: .*roman.*; raise options.sft_steps"):
        trainings.train(task, alone)


@pytest.mark.parametrize("method", ["rft", "grpo"])
@pytest.mark.parametrize("stop", [2, 5])
def test_stopped_run_goes_on_to_the_same_adapter(alone, inputs, tmp_path, monkeypatch, method, stop):
    """Stopped before the first sampling, and between two updates of one rollout."""
    _every_sample_is_right(monkeypatch)
    changes = {"method": method, "options": OPTIONS[method], "lora": NO_DROPOUT}
    whole = trainings.train(trainings.write_task(tmp_path / "whole", inputs, **changes), alone)
    task = trainings.write_task(tmp_path / "stopped", inputs, **changes)
    with monkeypatch.context() as patch:
        trainings.stop_after(patch, stop, tmp_path / "stopped" / "stop")
        with pytest.raises(Stopped):
            trainings.train(task, alone)
    (tmp_path / "stopped" / "stop").unlink()
    assert trainings.adapter(trainings.train(task, alone)) == trainings.adapter(whole)
    lines = trainings.progress(whole)
    assert [line["step"] for line in lines if line["phase"] == "train"] == list(range(1, 11))
    if method == "grpo":
        rollouts = [line for line in lines if line["phase"] == "rollout"]
        assert [line["step"] for line in rollouts] == [5, 7, 9]
        assert all(line["log_prob_difference"]["max"] < 1e-3 for line in rollouts)
    else:
        (sampled,) = [line for line in lines if line["phase"] == "samples"]
        assert sampled["step"] == 5 and sum(sampled["kept"].values()) > 0


@pytest.mark.parametrize(("method", "every"), [("grpo", 3), ("grpo", 5), ("rft", 3)])
def test_a_run_that_is_killed_after_every_step_ends_in_the_same_adapter(
    alone, inputs, tmp_path, monkeypatch, method, every
):
    """Each start goes one step further than the one before, so some resume inside of a rollout that is long over."""
    _every_sample_is_right(monkeypatch)
    options = OPTIONS[method] | ({"updates_per_rollout": 3} if method == "grpo" else {})
    changes = {"method": method, "options": options, "lora": NO_DROPOUT, "checkpoint_every": every}
    whole = trainings.train(trainings.write_task(tmp_path / "whole", inputs, **changes), alone)
    task = trainings.write_task(tmp_path / "killed", inputs, **changes)
    for step in range(1, 10):
        with monkeypatch.context() as patch:
            trainings.kill_after(patch, step)
            with pytest.raises(trainings.Killed):
                trainings.train(task, alone)
    out = trainings.train(task, alone)
    assert trainings.adapter(out) == trainings.adapter(whole)
    taught = [[(each["loss"], each["grad_norm"]) for each in _steps(folder)] for folder in (whole, out)]
    assert taught[0] == taught[1] and len(taught[0]) == 10


def _steps(out: Path) -> list[dict]:
    return [line for line in trainings.progress(out) if line["phase"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 2},
        {"dp": 2, "ep": 2},
        *(
            pytest.param(each, marks=pytest.mark.long)
            for each in ({"dp": 2}, {"tp": 2, "ep": 2}, {"tp": 2, "dp": 2, "ep": 4})
        ),
    ],
    ids=lambda each: " ".join(f"{axis}{size}" for axis, size in each.items()),
)
def test_rollouts_are_those_of_one_rank(alone, inputs, tmp_path, layout):
    """Several ranks draw the same completions as one, and each decodes and scores its part of them alone."""
    lines = []
    (tmp_path / "counting_rank.py").write_text(COUNTING_RANK)
    for name, axes in (("one", {}), ("more", layout)):
        task = trainings.write_task(tmp_path / name, inputs, method="grpo", options=OPTIONS["grpo"], lora=NO_DROPOUT)
        content = json.loads(task.read_text())
        content["config"]["parallelism"] |= axes
        task.write_text(json.dumps(content))
        done = trainings.spawn(["-c", LAUNCHER], task, PYTHONPATH=f"{tmp_path}:{ROOT}")
        assert done.returncode == 0, done.stderr
        dp = axes.get("dp", 1)
        counts = [json.loads(path.read_text()) for path in sorted((tmp_path / name / "out").glob("counted.*"))]
        assert len(counts) == dp * axes.get("tp", 1)
        assert counts == [{"decoded": [4 * 2 // dp] * 3, "scored": [4 * 2 // dp] * 6}] * len(counts)
        rollout = next(line for line in trainings.progress(tmp_path / name / "out") if line["phase"] == "rollout")
        lines.append({key: rollout[key] for key in ("reward", "by_family", "groups", "mean_tokens")})
    assert lines[0] == lines[1]


def test_samples_are_those_of_the_judge_s_engine(alone, inputs, tmp_path):
    """The model in training writes what the saved adapter writes in a model of its own."""
    from substrate.generate import load_model
    from substrate.inference.decode import Decoding, decode
    from substrate.interface.task import Task
    from substrate.training.rollouts import Sampler, Sampling
    from substrate.training.run import Training

    task = Task.read(trainings.write_task(tmp_path, inputs))
    task.out.mkdir()
    run = Training(task, load_recipe(task.recipe), alone)
    run.run()
    asked = run.rows[:5]
    groups = Sampler(run.model, alone, run.tokenizer, Sampling(0.0, 1.0, 12, 8)).sample(asked, 1, "")
    assert run.model.training
    judged = load_model(run.model.architecture, alone, task.base, task.out / "adapter")
    prompts = [(f"{n}/0", row.prompt) for n, row in enumerate(asked)]
    theirs = {one.item_id: one.ids for one in decode(judged, prompts, Decoding(12, 8), run.tokenizer.end_ids)}
    assert [group[0].ids for group in groups] == [theirs[f"{n}/0"] for n in range(5)]
    scored = run.log_probs([row._replace(learned=group[0].ids) for row, group in zip(asked, groups, strict=True)])
    for row, group in zip(asked, groups, strict=True):
        testing.assert_close(scored[row.item_id], group[0].log_probs, rtol=0, atol=1e-4)
    # A checkpoint with other ends stops there, and what stops at one is not truncated.
    run.tokenizer.special = replace(run.tokenizer.special, end_ids=tuple(range(run.model.architecture.vocab_size)))
    ended = Sampler(run.model, alone, run.tokenizer, Sampling(0.0, 1.0, 12, 8)).sample(asked, 1, "")
    assert {(len(one.ids), one.truncated) for group in ended for one in group} == {(1, False)}


def test_card_is_beside_the_adapter(alone, inputs, tmp_path):
    out = trainings.train(trainings.write_task(tmp_path, inputs), alone)
    card = json.loads((out / "data_card.json").read_text())
    assert card["num_places"] == 40 and set(card["families"]) == {"roman", "text_cipher", "unit_conversion"}
    known = set((inputs / "data/train_prompts.sha256").read_text().split())
    assert set(card["prompts"]) <= known and len(card["prompts"]) == 40


@pytest.mark.parametrize("rank", [32, 2])
def test_change_of_whole_weights_becomes_the_nearest_adapter(alone, inputs, tmp_path, rank):
    """At the rank of the matrices the adapter is the change; below, its product is the best of that rank."""
    from substrate.interface.task import Task
    from substrate.model.full import FullDelta
    from substrate.model.lora import Adapter, adapters
    from substrate.training.run import Training

    lora = NO_DROPOUT | {"rank": rank, "alpha": 7, "targets": ["q_proj", "v_proj", "o_proj", "shared_experts.up_proj"]}
    task = Task.read(trainings.write_task(tmp_path, inputs, method="sft_full", lora=lora, learning_rate=1e-2))
    task.out.mkdir()
    run = Training(task, load_recipe(task.recipe), alone)
    deltas = {id(each.base.module): each for each in adapters(run.model)}
    assert all(isinstance(each, FullDelta) for each in deltas.values())
    router = {name: tensor.clone() for name, tensor in run.model.named_parameters() if "router" in name}
    run.run()
    assert all(torch.equal(tensor, dict(run.model.named_parameters())[name]) for name, tensor in router.items())
    (line,) = [line for line in trainings.progress(task.out) if line["phase"] == "low_rank"]
    kept = total = 0.0
    for adapter in adapters(run.model):
        assert type(adapter) is Adapter
        whole = [adapter.base.of(d.delta(), "").whole() for d in (deltas[id(adapter.base.module)], adapter)]
        for rows_delta, rows_low in zip(*whole, strict=True):
            squares = torch.linalg.svdvals(rows_delta.double()).square()
            assert float((rows_delta - rows_low).square().sum()) == pytest.approx(float(squares[rank:].sum()), abs=1e-6)
            kept, total = kept + float(squares[:rank].sum()), total + float(squares.sum())
    assert line["kept_share"] == pytest.approx(kept / total, abs=1e-5)
    assert (line["kept_share"] > 0.9999) == (rank == 32)
    losses = [line["loss"] for line in trainings.progress(task.out) if line["phase"] == "train"]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_whole_weights_on_two_ranks_are_those_of_one(inputs, tmp_path):
    """Losses, and what the adapters multiply to: singular vectors themselves may turn their sign."""
    products = []
    for tp in (1, 2):
        task = trainings.write_task(tmp_path / str(tp), inputs, tp=tp, method="sft_full", lora=NO_DROPOUT)
        done = trainings.spawn(["-m", "substrate.train"], task)
        assert done.returncode == 0, done.stderr
        tensors = load_file(tmp_path / str(tp) / "out/adapter/adapter_model.safetensors")
        pairs = [name for name in tensors if name.endswith("lora_A.weight")]
        products.append({name: tensors[name.replace("lora_A", "lora_B")] @ tensors[name] for name in pairs})
    testing.assert_close(products[0], products[1], rtol=1e-3, atol=1e-4)
    losses = [
        [line["loss"] for line in trainings.progress(tmp_path / str(tp) / "out") if line["phase"] == "train"]
        for tp in (1, 2)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def _selector(choice: str, **changes) -> tuple[Selector, torch.Tensor]:
    tensor = torch.zeros(3)
    how = Selection(**({"choice": choice, "last_k": 2, "family_weights": {}} | changes))
    return Selector(how, (3, 6, 9, 10), [tensor]), tensor


def test_best_is_the_lowest_weighted_holdout_loss():
    for weights, best in (({}, 2.0), ({"a": 1.0}, 3.0), ({"a": 0.0, "b": 2.0}, 1.0)):
        selector, tensor = _selector("best", family_weights=weights)
        losses = {3: {"a": 9.0, "b": 1.0}, 6: {"a": 3.0, "b": 2.0}, 9: {"a": 2.0, "b": 4.0}, 10: {"a": 5.0, "b": 5.0}}
        for number, (step, values) in enumerate(losses.items(), start=1):
            tensor.fill_(number)
            assert selector.is_due(step)
            selector.offer(step, values)
        selector.apply()
        assert float(tensor[0]) == best


def test_average_is_the_mean_of_the_last_few():
    selector, tensor = _selector("average", last_k=3)
    for value, step in ((1.0, 3), (5.0, 6), (6.0, 9), (10.0, 10)):
        tensor.fill_(value)
        if selector.is_due(step):
            selector.offer(step, {})
    assert selector.at_steps == [6, 9, 10]
    selector.apply()
    assert float(tensor[0]) == pytest.approx(7.0)


def test_last_changes_nothing():
    selector, tensor = _selector("last")
    assert not any(selector.is_due(step) for step in range(11))
    selector.apply()
    assert not tensor.any()


@pytest.mark.parametrize("choice", ["best", "average"])
def test_chosen_state_survives_a_stop(alone, inputs, tmp_path, monkeypatch, choice):
    selection = {"choice": choice, "last_k": 3, "family_weights": {"roman": 2.0, "text_cipher": 1.0}}
    changes = {"selection": selection, "holdout_per_family": 2}
    whole = trainings.train(trainings.write_task(tmp_path / "whole", inputs, **changes), alone)
    candidates = [line for line in trainings.progress(whole) if line["phase"] == "candidate"]
    assert [line["step"] for line in candidates] == ([3, 6, 9, 10] if choice == "best" else [6, 9, 10])
    task = trainings.write_task(tmp_path / "stopped", inputs, **changes)
    with monkeypatch.context() as patch:
        trainings.stop_after(patch, 7, tmp_path / "stopped" / "stop")
        with pytest.raises(Stopped):
            trainings.train(task, alone)
    (tmp_path / "stopped" / "stop").unlink()
    assert trainings.adapter(trainings.train(task, alone)) == trainings.adapter(whole)
    last = trainings.train(trainings.write_task(tmp_path / "last", inputs, holdout_per_family=2), alone)
    if choice == "best":
        losses = {line["step"]: line["holdout_loss"] for line in candidates}
        assert candidates[-1]["chosen_steps"] == [min(losses, key=losses.get)]
    else:
        assert trainings.adapter(last) != trainings.adapter(whole)
        assert _shapes(last) == _shapes(whole)


def _shapes(out: Path) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in load_file(out / "adapter" / "adapter_model.safetensors").items()}


def test_lora_that_cannot_be_is_refused():
    for wrong in ({"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"targets": []}):
        with pytest.raises(UsageError, match=f"lora.{next(iter(wrong))}"):
            Lora(**(NO_DROPOUT | wrong))
