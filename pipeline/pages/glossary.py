"""The words of a page in a sentence each, for its last section. docs/glossary.md says more of every one of them."""

from __future__ import annotations

from collections.abc import Mapping

TERMS: Mapping[str, str] = {
    "alarm": (
        "A test's statistic is beyond its critical value. In at most 5 % of the campaigns in which nothing is wrong is there any "
        "alarm of a gap or of the board."
    ),
    "anchor": "Arm a0: the reference recipe under another random seed. It shows how much luck alone does.",
    "arm": "One of the eight training runs of a round, a0 to a7.",
    "article": "One of the numbered rules of the constitution.",
    "attempt": "One try at an arm by one worker. An arm that is started again has several.",
    "audit": "The check of a campaign from outside, which derives every decision again from the sealed log.",
    "axis": "One setting that a campaign may vary, with its range.",
    "baseline": (
        "The run that an arm's lift is taken over: the reference adapter, or the standing run once a round kept something."
    ),
    "board": "A leaderboard outside of the pipeline. It prints one score for a submission.",
    "campaign": "A folder that was frozen at its start, and all the rounds in it.",
    "canary": "A cheap sign that dev items were learned. Two of them make a family SUSPECT.",
    "claimed improvement": (
        "The runs of the standing recipes lie above those of the reference recipe by more than noise reaches. At most 5 % of "
        "campaigns make a false claim."
    ),
    "constitution": "The articles that say what a round may change and when something counts. No job can edit them.",
    "contrast": (
        "An experiment that is registered before it runs: half of a family's share of the data. If dev gains were learned items, "
        "dev falls and fresh holds."
    ),
    "control": "An arm that repeats the recipe that would stand if dev still counted in full.",
    "critical value": "The value beyond which a test raises an alarm, frozen before the first round.",
    "dead end": "A setting that is shown to be worse. It is never tried again in the campaign.",
    "decision": (
        "The record of what a round changed: which arm is kept, what is claimed, what follows, and the reasons with their articles."
    ),
    "dev": (
        "The puzzles that stay the same for the whole campaign, unless those of a reversed family are replaced. Every round's "
        "choice looks at them, so a recipe may come to suit them."
    ),
    "e-value": (
        "The board test's evidence E. 1 means no evidence; the larger it is, the less some family's gains arrive on the board."
    ),
    "exit class": (
        "The word for how an attempt ended, such as completed, diverged or out_of_memory. Only completed has a score."
    ),
    "family": "A kind of puzzle, such as roman or gravity.",
    "family state": (
        "What may be done with a family's dev score: UNPROVEN (the start), TRUSTED, SUSPECT, REVERSED-overfit, REVERSED-shift or "
        "RESTORED."
    ),
    "fresh": (
        "The puzzles of one round alone, the same for all its arms, made after the arms were trained. Nobody can have learned them."
    ),
    "gap": "The mean gain of a round's arms on dev minus that on fresh. A gap says that dev items were learned.",
    "kept": (
        "Said of the arm whose setting joins the standing recipe. It is kept for now: nothing is claimed of it, and the next round "
        "tests it again."
    ),
    "ladder": "The only board score that workers and proposers may be told.",
    "leading arm": "The arm of a round that the figures show for it: the one that was kept, else the axis arm of the largest value.",
    "leak": "The board itself has been learned: its scores run ahead of fresh items.",
    "lift": "The score of an arm minus the score of what it is compared with, on the same puzzles, in points.",
    "noise": "How much a score moves without a change of the recipe: by other puzzles, and by another training seed.",
    "points": "Hundredths of accuracy. From 50 % to 58 % is 8 points.",
    "power card": "The gap that the campaign's tests would have found with 80 % probability.",
    "quorum": "The number of scored arms below which a round decides nothing.",
    "reference": "The recipe that the campaign began with. Its adapter was trained once and is judged again in every round.",
    "reference adapter": "The adapter that was trained with the reference recipe once. Lifts are measured from it.",
    "replicate": "An arm that repeats a recipe unchanged, to measure how much luck does.",
    "retired": "Said of an axis that gained nothing in three looks in a row. It gets no arm any more.",
    "round": "Eight arms and one decision. Rounds are named r0001, r0002 and so on.",
    "sealed log": "A hash-chained, signed record of every act of the campaign. Decisions follow from it alone.",
    "set aside": (
        "Said of a setting whose one run lies far below its baseline. It shows nothing; the planner skips it, and a proposal may "
        "try it again."
    ),
    "shift": "A gain that dev and fresh agree on does not arrive on the board.",
    "shown to be worse": (
        "Below what it is compared with by more than noise reaches. At most 5 % of campaigns say it falsely of anything."
    ),
    "standing recipe": "The reference recipe with every setting that rounds have kept. Further rounds start from it.",
    "submission": "One adapter that was given to the board.",
    "suspicion": "A test's statistic beyond its lower threshold. It makes a family SUSPECT and is no alarm.",
    "value": (
        "What the choice of an arm goes by: its gains on dev and fresh, shrunk toward the round's mean, with what the board adds."
    ),
}  # fmt: skip


def anchor(term: str) -> str:
    """The anchor of a term on the page. Raises KeyError for a term that is not explained there."""
    if term not in TERMS:
        raise KeyError(f"the page's glossary has no {term!r}")
    return f"term-{term.replace(' ', '-')}"
