"""What the gates of one first contact know: the configuration, the folders, and what the person gave to compare with.

A first contact keeps its files in `<campaign>.first-contact/`, beside the campaign that it prepares: `gates.json`, and a small campaign
`<name>-probe/`, which trains ten steps and judges some twenty items with the same image, sandbox and jobs as the real one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pipeline.campaign.errors import PipelineError
from pipeline.campaign.facts import load_constitution
from pipeline.campaign.layout import Campaign, Round
from pipeline.config import settings
from pipeline.config.settings import Settings
from pipeline.rounds import init

PROBE_STEPS = 10
PROBE_ITEMS = 20
SUFFIX = ".first-contact"


@dataclass
class Visit:
    """One first contact.

    campaign: the one that the person will run; it need not exist. log_probs: JSON lines of another program's log-probabilities. sha256: a
    file as `sha256sum` prints it. say: prints a line of progress.
    """

    campaign: Campaign
    overrides: Sequence[str]
    log_probs: Path | None = None
    sha256: Path | None = None
    say: Callable[[str], None] = field(default=print)

    @cached_property
    def chosen(self) -> Settings:
        """The configuration that the overrides compose. Raises as `settings.compose`."""
        return settings.compose(self.overrides)

    def check(self) -> None:
        """Raise ConfigError for a name that the campaign cannot have, and what composing the configuration raises."""
        if not self.campaign.frozen.exists():
            init.check_is_new(self.campaign)
        _ = self.chosen

    def check_can_be_planned(self) -> str:
        """Raise what `round` would raise for this configuration on any machine.

        Returns why this machine could not freeze it, if the checkpoint is not here or lacks files; else an empty string.
        """
        rules = load_constitution()
        init.check_can_be_planned(self.chosen, rules, is_draft=True)
        try:
            init.check_can_be_planned(self.chosen, rules, is_draft=False)
        except PipelineError as error:
            return str(error)
        return ""

    @property
    def folder(self) -> Path:
        return self.campaign.folder.with_name(self.campaign.name + SUFFIX)

    @property
    def probe(self) -> Campaign:
        return Campaign(self.folder / f"{self.campaign.name}-probe")

    @property
    def probe_round(self) -> Round:
        """The round of the probe whose arm a0 trains the reference recipe and judges it on dev."""
        return self.probe.round("r0000")

    @cached_property
    def probe_overrides(self) -> list[str]:
        """The person's overrides, made small: ten steps, some twenty items, no board, and no more training puzzles than ten steps read.

        The axes are left out. The probe moves none, and their ranges are for the recipe as the person has it, such as warm-ups of 10 to 90
        steps.
        """
        recipe, tasks = self.chosen.recipe, self.chosen.tasks
        per_family = -(-PROBE_ITEMS // len(tasks.families))
        rows = PROBE_STEPS * recipe.batch_size + recipe.holdout_per_family
        small = {
            "recipe.num_steps": PROBE_STEPS,
            "recipe.warmup_steps": min(recipe.warmup_steps, 1),
            "tasks.num_train_per_family": min(tasks.num_train_per_family, rows),
            "tasks.num_dev_per_family": per_family,
            "tasks.num_fresh_per_family": per_family,
        }
        if "sft_steps" in recipe.options:  # methods that sample begin with steps on worked solutions
            small["recipe.options.sft_steps"] = PROBE_STEPS // 2
        return [*self.overrides, "external=none", "policy.axes=[]", *(f"{key}={value}" for key, value in small.items())]


def paths_of(probe: Campaign) -> tuple[Path, Path]:
    """(the rows that the forward pass is asked for, what it answered), beside the probe campaign."""
    return probe.folder.parent / "rows.jsonl", probe.folder.parent / "forward"
