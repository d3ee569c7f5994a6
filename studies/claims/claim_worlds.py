"""The truth of simulated campaigns in which claims are tested: the worlds by name in which nothing has an effect, and those with a planted effect."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.stats.design import Design

DESIGNS = {"6 x 300": Design(), "3 x 100": Design(families=3, dev_items=100, fresh_items=100)}


@dataclass(frozen=True)
class ClaimWorld:
    """Lifts and standard deviations are accuracies (0.03 = 3 points), difficulties are probits. In the default nothing has an effect."""

    seed_sd: float = 0.01  # of a run's luck, in all families alike
    tails: float = (
        0.0  # degrees of freedom of Student's t for the luck, 0 for normal; its standard deviation stays seed_sd
    )
    noisy: float = 1.0  # factor of the luck where the learning rate or the mixture moved or stands
    anchors: float = 1.0  # the same for runs of the reference recipe
    collapse_probability: float = 0.0
    collapse: float = 0.0
    reference_luck: float | None = None  # of the reference adapter; None: drawn like that of any run
    recipe_sd: float = 0.0  # of a setting's effect in each family
    common_sd: float = 0.0  # of a setting's effect in all families alike
    kept_share: float = 1.0  # of a setting's effect that stays once it stands
    planted: float = 0.0  # effect of the first axis's setting of one round
    planted_round: int = 1
    planted_stands: bool = (
        True  # False: the effect is gone once it stands, so that the search is as in a world without it
    )
    dev_easier: float = 0.0
    fresh_easier: float = 0.0
    easier_families: int = 99  # the weakest ones
    fresh_harder: float = 0.0  # more in each round: a drifting generator
    truncated: float = 0.05  # share of the wrong answers that are truncated ones


NULLS = {
    "sd .01": ClaimWorld(),
    "sd .02": ClaimWorld(seed_sd=0.02),
    "sd .03": ClaimWorld(seed_sd=0.03),
    "sd .034": ClaimWorld(seed_sd=0.034),
    "noisy axes, sd .01": ClaimWorld(noisy=4),
    "noisy axes, sd .02": ClaimWorld(noisy=4, seed_sd=0.02),
    "30 % collapse by 10 points": ClaimWorld(collapse_probability=0.3, collapse=0.1),
    "5 % collapse by 5 points": ClaimWorld(collapse_probability=0.05, collapse=0.05),  # as in studies.simulated.World
    "lucky reference (+3)": ClaimWorld(reference_luck=0.03),
    "unlucky reference (-7)": ClaimWorld(reference_luck=-0.07),
    "unlucky, sd .02": ClaimWorld(reference_luck=-0.07, seed_sd=0.02),
    "unlucky, sd .03": ClaimWorld(reference_luck=-0.07, seed_sd=0.03),
    "anchors 3 x as noisy, sd .01": ClaimWorld(anchors=3),
    "anchors 3 x as noisy, sd .02": ClaimWorld(anchors=3, seed_sd=0.02),
    "heavy tails (t, 3 df), sd .03": ClaimWorld(seed_sd=0.03, tails=3),
    "drifting generator": ClaimWorld(fresh_harder=0.1),
}
"""Nothing has an effect. `noisy axes`: runs vary four times as much where the learning rate or the mixture moved or stands."""
CRASHES = {"5 % lose 20 points": ClaimWorld(collapse_probability=0.05, collapse=0.2)}
"""One run cannot tell a bad setting from such a crash. Claims hold here; "shown to be worse" of one arm does not."""
HEALTHY = {
    "healthy": ClaimWorld(recipe_sd=0.03, common_sd=0.015, kept_share=0.7, collapse_probability=0.05, collapse=0.05),
    "healthy, 30 % collapse": ClaimWorld(0.01, recipe_sd=0.03, common_sd=0.015, kept_share=0.7, collapse_probability=0.3, collapse=0.1),
}  # fmt: skip
"""Settings have effects of their own, so that a claim may be true. For the canaries."""
TRUNCATED = {
    f"{name}, {share:.0%} truncated": replace(world, truncated=share)
    for name, world in (
        ("sd .03", NULLS["sd .03"]),
        ("collapses", NULLS["30 % collapse by 10 points"]),
        *HEALTHY.items(),
    )
    for share in (0.01, 0.2)
}
"""More or fewer wrong answers are truncated ones than the 5 % of the other worlds. For the canaries."""


def unequal() -> dict[str, ClaimWorld]:
    """Null worlds in which dev or fresh is easier or harder than the level of the reference, in the weakest family or in all."""
    worlds = {}
    for probits in (0.3, 0.6, 1.0):
        for way, shift in (("easier", probits), ("harder", -probits)):
            for scope, families in (("one family", 1), ("all", 99)):
                world = ClaimWorld(seed_sd=0.02, easier_families=families)
                worlds[f"dev {way} by {probits:g}, {scope}"] = replace(world, dev_easier=shift)
                worlds[f"fresh {way} by {probits:g}, {scope}"] = replace(world, fresh_easier=shift)
    return worlds
