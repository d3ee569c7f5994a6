"""GRPO: make completions likelier that beat the mean reward of their group (arXiv:2402.03300, section 4.1).

    steps 0 .. sft_steps - 1     as sft_lora; the policy after them is the reference
    every rollout                `samples_per_prompt` completions (a group) of each of the next `batch_size x
                                 updates_per_rollout / samples_per_prompt` prompts; reward 1 if the answer is right, else 0
    each of its updates          one part of the rollout's completions

    A_i    = (r_i - mean(r)) / (std(r) + eps)                                     the same for all tokens of completion i
    rho_t  = pi(token t) / pi_old(token t)
    loss   = - mean_i mean_t [ min(rho_t A_i, clip(rho_t, 1 - clip, 1 + clip) A_i) - kl_weight * KL_t ]
    KL_t   = pi_ref / pi - log(pi_ref / pi) - 1                                   unbiased and >= 0

The policy pi is the distribution that completions are drawn from, softmax(logits / temperature), everywhere: in pi,
pi_old and pi_ref, and in the engine's record. A nucleus (top_p below 1) is refused. It would be another set of tokens after
each update, and a token outside the new one has a ratio of zero and no gradient that could bring it back.

The engine that draws the completions rounds differently from the trainer. So `pi_old` is the trainer's own
log-probability, computed before the rollout's first update. Its difference to the engine's is in progress.jsonl
(`log_prob_difference`): if it grows, the samples no longer come from the policy that is trained. The router has no
adapter, so its choice changes only with its input.

A checkpoint between two updates holds the rollout, because a resumed run could not draw it again: its weights have moved.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, NamedTuple

from substrate.data.rows import Row
from substrate.recipes.base_recipe import require
from substrate.recipes.own_samples import OwnSamples, SamplingOptions

if TYPE_CHECKING:
    import torch

    from substrate.data.batches import Batch, MicroBatch, Shape
    from substrate.model import HybridModel
    from substrate.training.run import Training

EPS = 1e-6  # added to the group's deviation, so that a group of equal rewards has advantages of zero
REFERENCE, ROLLOUT = "reference", "rollout"


@dataclass(frozen=True)
class Options(SamplingOptions):
    """The keys of `recipe.options`; a group has `samples_per_prompt` completions. Raises UsageError for a wrong value."""

    updates_per_rollout: int
    clip: float
    kl_weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.updates_per_rollout >= 1, "options.updates_per_rollout", self.updates_per_rollout, "at least 1")
        require(self.samples_per_prompt >= 2, "options.samples_per_prompt", self.samples_per_prompt, "at least 2")
        require(self.kl_weight >= 0, "options.kl_weight", self.kl_weight, "at least 0")
        require(
            self.top_p == 1,
            "options.top_p",
            self.top_p,
            "1: the nucleus changes with each update, and a token that left it has no ratio; lower options.temperature",
        )
        require(0 < self.clip < 1, "options.clip", self.clip, "above 0, below 1")


class Grpo(OwnSamples):
    """The method of hydra_conf/recipe/grpo.yaml."""

    OPTIONS = Options
    own: Options

    def check_layout(self, pp: int, dp: int) -> None:
        super().check_layout(pp, dp)
        require(
            self.lora.dropout == 0, "lora.dropout", self.lora.dropout, "0: the ratio to the old policy must be exact"
        )
        whole = self.batch_size % self.own.samples_per_prompt == 0
        require(whole, "batch_size", self.batch_size, f"a multiple of samples_per_prompt {self.own.samples_per_prompt}")

    def batch(self, run: "Training") -> "Batch":
        if run.step < self.own.sft_steps:
            return run.stream[run.step]
        if REFERENCE not in run.copies:
            run.copy(REFERENCE)
        number, update = divmod(run.step - self.own.sft_steps, self.own.updates_per_rollout)
        if update == 0:
            run.kept[ROLLOUT] = [asdict(each) for each in self._roll_out(run, number)]
        part = run.kept[ROLLOUT][update * self.batch_size : (update + 1) * self.batch_size]
        if update == self.own.updates_per_rollout - 1:
            del run.kept[ROLLOUT]
        return _batch([Scored(**{**each, "row": Row(*each["row"])}) for each in part], run.shape)

    def outputs(self, model: "HybridModel", batch: "MicroBatch", temperature: float = 1.0) -> "torch.Tensor":
        """Returns log-probabilities as the base class does, of a rollout's tokens in the policy that drew them."""
        is_rollout = isinstance(batch, PolicyBatch)
        return super().outputs(model, batch, self.own.temperature if is_rollout else temperature)

    def loss(self, outputs: "torch.Tensor", batch: "MicroBatch | PolicyBatch") -> "torch.Tensor":
        """Returns sft_lora's loss before the first rollout, then the objective in the module's docstring."""
        if not isinstance(batch, PolicyBatch):
            return super().loss(outputs, batch)
        weights, advantages, old, reference = (
            tensor.to(outputs) for tensor in (batch.weights_1L, batch.advantages_1L, batch.old_1L, batch.reference_1L)
        )
        learned = weights > 0
        # Masked, because outputs of other tokens may be so far from 0 that exp overflows.
        ratio = (outputs - old).masked_fill(~learned, 0.0).exp()
        clipped = ratio.clamp(1 - self.own.clip, 1 + self.own.clip)
        gain = (ratio * advantages).minimum(clipped * advantages)
        to_reference = (reference - outputs).masked_fill(~learned, 0.0)
        divergence = to_reference.exp() - to_reference - 1
        return -((gain - self.own.kl_weight * divergence) * weights).sum()

    def teaches(self, batch: "Batch") -> bool:
        """Whether a completion beats its group: where all rewards are equal, the policy is told nothing."""
        return any(not isinstance(part, PolicyBatch) or bool(part.advantages_1L.any()) for part in batch.micro_batches)

    def _roll_out(self, run: "Training", number: int) -> list["Scored"]:
        """Samples completions of the next prompts, group after group, and scores their tokens under both policies."""
        from substrate.training.rollouts import Sampling, by_family

        own, begun = self.own, time.monotonic()
        num_prompts = self.batch_size * own.updates_per_rollout // own.samples_per_prompt
        first = own.sft_steps * self.batch_size + number * num_prompts
        asked = [run.rows[place % len(run.rows)] for place in range(first, first + num_prompts)]
        how = Sampling(own.temperature, own.top_p, own.max_new_tokens, own.decode_batch_size)
        groups = run.sampler(how).sample(asked, own.samples_per_prompt, f"{run.task.seed}/rollout/{number}")
        drawn = [one for group in groups for one in group]
        rows = [
            Row(f"{place}/{copy}", row.family, row.prompt, one.ids, row.answer)
            for place, (row, group) in enumerate(zip(asked, groups, strict=True))
            for copy, one in enumerate(group)
        ]
        old = run.log_probs(rows, own.temperature)
        reference = run.with_copy(REFERENCE, lambda: run.log_probs(rows, own.temperature))
        apart = [
            abs(ours - engines)
            for row, one in zip(rows, drawn, strict=True)
            for ours, engines in zip(old[row.item_id], one.log_probs, strict=True)
        ]
        run.progress.write(
            "rollout",
            step=run.step + 1,
            reward=fmean(one.reward for one in drawn),
            by_family=by_family(asked, groups),
            mixed_groups=sum(len({one.reward for one in group}) > 1 for group in groups),
            groups=len(groups),
            mean_tokens=round(fmean(len(one.ids) for one in drawn), 2),
            log_prob_difference={"mean": fmean(apart), "max": max(apart)},
            seconds=round(time.monotonic() - begun, 3),
        )
        advantages = [advantage for group in groups for advantage in group_advantages([one.reward for one in group])]
        return [
            Scored(row, advantage, old[row.item_id], reference[row.item_id])
            for row, advantage in zip(rows, advantages, strict=True)
        ]


@dataclass(frozen=True)
class Scored:
    """A completion, its advantage, and its tokens' log-probabilities in nats under the old and the reference policy."""

    row: Row
    advantage: float
    old: list[float]
    reference: list[float]


class PolicyBatch(NamedTuple):
    """A micro-batch of completions; L and the first five fields are as in `batches.MicroBatch`."""

    tokens_1L: "torch.Tensor"
    labels_1L: "torch.Tensor"
    weights_1L: "torch.Tensor"  # 1 / (tokens of the completion x number of completions)
    rows: Sequence[Row]
    lengths: Sequence[int]
    advantages_1L: "torch.Tensor"  # of each token's completion; 0 where nothing is learned, as in the next two
    old_1L: "torch.Tensor"  # log-probabilities
    reference_1L: "torch.Tensor"


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """Returns (r - mean) / (std + EPS) with the population's std; all zero if all rewards are equal."""
    mean, deviation = fmean(rewards), pstdev(rewards)
    return [(reward - mean) / (deviation + EPS) for reward in rewards]


def _batch(samples: Sequence[Scored], shape: "Shape") -> "Batch":
    """Returns this rank's part of an update."""
    import torch

    from substrate.data.batches import by_row, make_batch

    batch = make_batch([sample.row for sample in samples], shape, "per_row")
    by_id = {sample.row.item_id: sample for sample in samples}
    parts = []
    for each in batch.micro_batches:
        advantages_1L, old_1L, reference_1L = (torch.zeros_like(each.weights_1L) for _ in range(3))
        for row, *places in zip(
            each.rows, *(by_row(each, t) for t in (advantages_1L, old_1L, reference_1L)), strict=True
        ):
            sample = by_id[row.item_id]
            for place, values in zip(places, (sample.advantage, sample.old, sample.reference), strict=True):
                place[-len(row.learned) :] = torch.tensor(values)
        parts.append(
            PolicyBatch(**each._asdict(), advantages_1L=advantages_1L, old_1L=old_1L, reference_1L=reference_1L)
        )
    return batch._replace(micro_batches=parts)
