"""The simulated scenarios: worlds in which nothing is wrong, those of the design's table, and harder ones beyond it."""

from __future__ import annotations

from itertools import product

from studies.simulated import World

NULLS = {
    "healthy": World(),
    "noise": World(recipe_sd=0, common_sd=0),  # no recipe does anything
    "het": World(slope_sd=0.2, stack_sd=0.007),  # target slopes .6 to 1.4, another evaluation stack
}
"""Nothing is wrong here, and all sets are equally hard."""
SUDDEN = (0.0, 0.0, 1.0, 1.0)
DESIGNED = {
    "G_flat": World(exploit_sd=0.08),
    "G_rev": World(exploit_sd=0.08, lost_target=0.5),
    "S_rev": World(exploit_sd=0.08, lost_target=0.5, efficacy=SUDDEN),
    "X_flat": World(exploit_sd=0.08, fools_fresh=True),
    "X_rev": World(exploit_sd=0.08, lost_target=0.5, fools_fresh=True),
    "leaky": World(exploit_sd=0.08, fools_board=True),
}
"""G: arms learn dev items from round 2 on. S: they learn them at once in round 3. X: fresh items are fooled too. rev: the target falls.
leaky: the board is fooled, and fresh items are not."""
WHERE: dict[str, tuple[int, ...] | None] = {"in the strongest": (0,), "in the weakest": (-1,), "in all": None}
SIZES = {f"{way} by {size}": sign * size for size in (0.3, 0.6, 1.0) for way, sign in (("easier", 1), ("harder", -1))}
UNEQUAL = (
    {
        f"dev {how} {where}": World(dev_easier=probits, unequal=families)
        for (how, probits), (where, families) in product(SIZES.items(), WHERE.items())
    }
    | {
        f"board {how} {where}": World(board_easier=probits, unequal=families)
        for (how, probits), (where, families) in product(SIZES.items(), WHERE.items())
    }
    | {
        "dev easier, board harder by 0.6": World(dev_easier=0.6, board_easier=-0.6),
        "dev harder, board easier by 0.6": World(dev_easier=-0.6, board_easier=0.6),
        "dev easier, board harder by 1": World(dev_easier=1.0, board_easier=-1.0),
        "dev harder, board easier by 1": World(dev_easier=-1.0, board_easier=1.0),
        "dev and board easier by 1": World(dev_easier=1.0, board_easier=1.0),
        "dev and board harder by 1": World(dev_easier=-1.0, board_easier=-1.0),
        "het, board easier by 0.6": World(slope_sd=0.2, stack_sd=0.007, board_easier=0.6),
        "het, board harder by 0.6": World(slope_sd=0.2, stack_sd=0.007, board_easier=-0.6),
        "het, dev easier, board harder by 0.6": World(slope_sd=0.2, stack_sd=0.007, dev_easier=0.6, board_easier=-0.6),
    }
)
"""Nothing is wrong here either: effects are equal in probits, and sets are not equally hard."""
CALIBRATION = NULLS | {
    name: UNEQUAL[name]
    for name in (
        "dev easier by 1.0 in all",
        "dev harder by 1.0 in all",
        "board easier by 1.0 in the weakest",
        "board harder by 1.0 in the weakest",
        "board harder by 1.0 in the strongest",
    )
}
"""Critical values are quantiles under the worst of these. The others of UNEQUAL and BEYOND_NULLS stay below their worst (docs/evidence.md)."""
BEYOND_NULLS = {
    "correlated, healthy": World(family_correlation=0.8),
    "collapses, healthy": World(collapse_probability=0.3, collapse=0.1),
    "drift, healthy": World(
        fresh_harder=0.1
    ),  # fresh items harder by a tenth of a probit a round, 3 to 4 points at 50 %
    "drift the other way": World(fresh_harder=-0.1),
    "drift, dev and board easier by 0.6": World(fresh_harder=0.1, dev_easier=0.6, board_easier=0.6),
    "heavy tails": World(seed_sd=0.03, seed_freedom=3),
    "noise by family": World(family_seed_sd=0.03),
    "items correlated .5": World(item_correlation=0.5),
    "items correlated .95": World(item_correlation=0.95),
    "lucky reference": World(reference_luck=0.03),
    "unlucky reference": World(reference_luck=-0.07),
    "slopes .2-1.8": World(slope_sd=0.5, slope_range=(0.2, 1.8), stack_sd=0.007),
}
"""Nothing is wrong here, but for the last world, in which a family has half stopped."""
BEYOND = {
    "one cheat in eight": World(exploit_mean=0.1, exploit_sd=0.08, cheating_arms=1),
    "one cheat, shift": World(exploit_mean=0.1, exploit_sd=0.08, cheating_arms=1, fools_fresh=True),
    "many small, G": World(exploit_sd=0.02, exploited_families=6),
    "many small, X": World(exploit_sd=0.02, exploited_families=6, fools_fresh=True),
    "correlated, G": World(exploit_sd=0.08, family_correlation=0.8),
    "correlated, X": World(exploit_sd=0.08, family_correlation=0.8, fools_fresh=True),
    "collapses, G": World(exploit_sd=0.08, collapse_probability=0.3, collapse=0.1),
    "collapses, X": World(exploit_sd=0.08, collapse_probability=0.3, collapse=0.1, fools_fresh=True),
    "drift, G": World(exploit_sd=0.08, fresh_harder=0.1),
    "dev easier by 0.6, G": World(exploit_sd=0.08, dev_easier=0.6),
    "dev harder by 0.6, G": World(exploit_sd=0.08, dev_easier=-0.6),
    "board easier by 0.6, X": World(exploit_sd=0.08, fools_fresh=True, board_easier=0.6),
    "board harder by 0.6, X": World(exploit_sd=0.08, fools_fresh=True, board_easier=-0.6),
    "all learned": World(exploit_sd=0.08, fools_fresh=True, fools_board=True),  # nothing honest is left to compare with
}
