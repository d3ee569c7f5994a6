"""The page that docs/report.md explains: the second round of a campaign with simulated outcomes. `python -m tests.support.example_page` prints it."""

from pipeline.campaign.records import Arm
from pipeline.decision import derive, history
from pipeline.reporting import document, page
from pipeline.stats.design import Design
from tests.support.logs import LogCampaign, Truth

LEVELS = {"roman": 0.85, "text_cipher": 0.35, "unit_conversion": 0.55}


class Example(LogCampaign):
    """It also records which arms are submitted, as a campaign does."""

    def submit(self, name: str, arms: tuple[Arm, ...]) -> None:
        chosen = derive.choose_submissions(history.read_history(self.records), name)
        self.add(history.CHOSEN, round=name, arms=list(chosen))
        super().submit(name, arms)


def world(name: str, arm: Arm) -> Truth:
    """The learning rate helps, a small LoRA alpha ruins round 1; in round 2 one arm diverges and another learns the dev items of one family."""
    is_second, axis = name == "r0002", arm.axis
    if is_second and axis == "trace_style":
        return Truth(missing="diverged")
    gain = dict.fromkeys(LEVELS, 0.07 if "recipe.learning_rate" in dict(arm.overrides) else 0.0)
    if is_second and axis in ("clip_norm", "schedule", "weak_family_share"):
        gain = dict.fromkeys(LEVELS, 0.05)
    if is_second and axis == "learning_rate":
        gain = dict.fromkeys(LEVELS, 0.12)
    if axis == "lora_alpha":
        gain = {"roman": -0.8, "text_cipher": -0.3, "unit_conversion": -0.5}
    if is_second and axis == "lora_rank":
        return Truth({}, {"unit_conversion": 0.42})
    return Truth(gain)


def text() -> str:
    """The page of r0002, without the table of the LoRA targets, which no log has."""
    design = Design(rounds=8, families=3, dev_items=100, fresh_items=100, board_rows=300, submissions=2)
    campaign = Example(world, design, LEVELS)
    for _ in range(2):
        campaign.play()
    return document.as_text(page.of_log(campaign.records, "r0002", "tiny"))


if __name__ == "__main__":
    print(text())
