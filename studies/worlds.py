"""The simulated scenarios: three worlds in which nothing is wrong, those of the design's table, and harder ones beyond it."""

from __future__ import annotations

from studies.simulated import World

NULLS = {
    "healthy": World(),
    "noise": World(recipe_sd=0, common_sd=0),  # no recipe does anything
    "het": World(slope_sd=0.2, stack_sd=0.007),  # target slopes .6 to 1.4, another evaluation stack
}
"""Nothing is wrong here. Critical values are quantiles under the worst of these."""
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
BEYOND_NULLS = {
    "slopes .2-1.8": World(slope_sd=0.5, slope_range=(0.2, 1.8), stack_sd=0.007),
    "correlated, healthy": World(family_correlation=0.8),
    "collapses, healthy": World(collapse_probability=0.3, collapse=0.1),
    "drift, healthy": World(
        fresh_harder=0.1
    ),  # fresh items harder by a tenth of a probit a round, 3 to 4 points at 50 %
}
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
    "all learned": World(exploit_sd=0.08, fools_fresh=True, fools_board=True),  # nothing honest is left to compare with
}
