"""Measure how often claims, "shown to be worse" and canaries err, and how often they find what is there: part of `evidence simulate`.

A level is the share of campaigns, and what must stay below the limit is its one-sided upper 95 % bound. Power is the share of campaigns
in which a setting that was planted in round 1 is kept then and an improvement is claimed by round 3 or 4.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import binomtest

from pipeline.campaign import facts
from pipeline.claims.assess_claims import DOUBLED, FINAL_ROUND, RUNNING
from studies.alarm_table import upper_95
from studies.claims import canary_twin, claim_check, claim_twin
from studies.claims.claim_play import Campaigns, Played
from studies.claims.claim_twin import STANDING, Found
from studies.claims.claim_worlds import CRASHES, DESIGNS, HEALTHY, NULLS, TRUNCATED, ClaimWorld, unequal
from studies.simulated import Flags

SEED = 54  # neither that of the critical values nor those of the other tables
BATCH = 5000
LIMITS = {"claimed": 0.05, "worse": 0.05, "suspect": 0.01}
"""claimed: an improvement, where nothing has an effect. worse: the standing recipe or one arm is shown to be worse. suspect: some family is
SUSPECT by canaries alone. `set_aside` has no limit: it is a rule of thumb."""
EFFECTS = (0.02, 0.03, 0.05)
PLANTED_SD = {"6 x 300": (0.01, 0.02, 0.03), "3 x 100": (0.01, 0.02)}
RUINOUS = (-0.2, -0.3)
REAL = ("claimed", "worse", "suspect", "agrees")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Level:
    """How often campaigns of one world say something: shares, and which of them have an upper bound beyond the limit."""

    design: str
    confirmation: str
    rounds: int
    world: str
    campaigns: int
    claimed: float
    worse: float
    suspect: float
    set_aside: float
    upper: Mapping[str, float]
    beyond: tuple[str, ...]


@dataclass(frozen=True)
class Power:
    """How often a planted setting (`effect`, a difference of accuracies) is kept, claimed by round 3 and 4, and claimed if it stood then."""

    design: str
    confirmation: str
    seed_sd: float
    effect: float
    kept: float
    by_round_3: float
    by_round_4: float
    if_it_stands: float


def levels(
    worlds: Mapping[str, ClaimWorld], designs: Sequence[str], confirmation: str, rounds: int, num: int
) -> Iterator[Level]:
    """Yield a level for each design and world."""
    for design in designs:
        for name, world in worlds.items():
            said: dict[str, list[Flags]] = {"claimed": [], "worse": [], "suspect": [], "set_aside": []}
            for played, found in _batches(world, design, confirmation, rounds, num, name):
                said["claimed"].append(np.asarray(found.claimed.any(1)))
                said["worse"].append(np.asarray(found.worse_standing.any(1) | found.worse_arms.any((1, 2))))
                said["suspect"].append(suspects(played, DESIGNS[design].fresh_items))
                said["set_aside"].append(np.asarray(played.set_aside.any((1, 2))))
            counts = {key: int(np.concatenate(flags).sum()) for key, flags in said.items()}
            upper = {key: round(upper_95(counts[key], num), 4) for key in LIMITS}
            limited = [key for key in LIMITS if not (key == "claimed" and world.recipe_sd)]
            shares = {key: round(count / num, 4) for key, count in counts.items()}
            beyond = tuple(
                key
                for key in limited
                if upper[key] > LIMITS[key] and (is_enough(num, key) or shares[key] > LIMITS[key])
            )
            yield Level(design, confirmation, rounds, name, num, **shares, upper=upper, beyond=beyond)


def suspects(played: Played, items: int) -> Flags:
    """(C,) whether two canaries fire for one family in one round."""
    flags = []
    for number in range(1, played.reference.shape[1] + 1):
        fired = canary_twin.canaries(
            played.runs.until(number),
            played.right[:, :number],
            played.truncated[:, :number],
            played.reference[:, :number],
            played.item_variance[:, :number],
            items,
        )
        flags.append((fired.sum(2) >= 2).any(1))
    return np.asarray(np.any(flags, 0))


def powers(confirmation: str, num: int) -> Iterator[Power]:
    """Yield the power over four rounds for each design, spread of retraining and planted effect."""
    for design, spreads in PLANTED_SD.items():
        for seed_sd in spreads:
            for effect in EFFECTS:
                world = ClaimWorld(seed_sd=seed_sd, planted=effect)
                rows = [
                    _planted(played, found, effect)
                    for played, found in _batches(world, design, confirmation, 4, num, f"{seed_sd} {effect}")
                ]
                kept, early, late, stands, both = np.concatenate(rows, 1).mean(1)
                shares = [round(float(share), 3) for share in (kept, early, late, both / max(stands, 1 / num))]
                yield Power(design, confirmation, seed_sd, effect, *shares)


def _planted(played: Played, found: Found, effect: float) -> Flags:
    """(5, C) the planted setting is kept; and claimed by round 3; and by round 4; it stands in round 4; and is then claimed."""
    stands = played.runs.kind == STANDING
    has_it = (stands & (played.effect > effect / 2)).any(2)
    kept, at_last = has_it[:, 1], has_it[:, 3]
    early, late = found.claimed[:, :3].any(1), found.claimed.any(1)
    return np.stack([kept, kept & early, kept & late, at_last, at_last & late])


def ruinous(num: int) -> Iterator[dict[str, Any]]:
    """Yield how often one arm that loses so much is shown to be worse, in the round in which it runs, 1 or 3."""
    for design in DESIGNS:
        for seed_sd in (0.01, 0.03):
            for effect in RUINOUS:
                row: dict[str, Any] = {"design": design, "seed_sd": seed_sd, "effect": effect}
                for number in (1, 3):
                    world = ClaimWorld(seed_sd=seed_sd, planted=effect, planted_round=number)
                    shown, runs = 0, 0
                    for played, found in _batches(world, design, RUNNING, 4, num, f"worse {seed_sd} {effect} {number}"):
                        ruined = played.effect[:, number - 1] < effect / 2
                        runs += int(ruined.sum())
                        shown += int((found.worse_arms[:, number - 1] & ruined).sum())
                    row[f"round_{number}"] = round(shown / runs, 3)
                yield row


def _batches(
    world: ClaimWorld, design: str, confirmation: str, rounds: int, num: int, name: str
) -> Iterator[tuple[Played, Found]]:
    """Campaigns of a world, some at a time, and what was said in them. A name gives the same campaigns again."""
    rules, size = facts.load_constitution(), replace(DESIGNS[design], rounds=rounds)
    words = zlib.crc32(f"{design}/{confirmation}/{rounds}/{name}".encode())
    for start in range(0, num, BATCH):
        rng = np.random.Generator(np.random.SFC64(np.random.SeedSequence([SEED, words, start])))
        played = Campaigns(world, size, confirmation, rng, min(BATCH, num - start)).play()
        yield played, claim_twin.every_round(played.runs, confirmation, rules)


def measure(num: int, num_real: int, tell: Progress) -> dict[str, Any]:
    """All tables: levels, power, ruinous arms, and the check of the real code with `num_real` campaigns a world (0 leaves it out)."""
    found: list[Level] = []
    everywhere = {**NULLS, **CRASHES, **HEALTHY, **TRUNCATED, **unequal()}
    for worlds, confirmation, rounds in (
        (everywhere, RUNNING, 4), (NULLS, DOUBLED, 4), (NULLS, FINAL_ROUND, 4), ({**NULLS, **HEALTHY}, RUNNING, 8),
    ):  # fmt: skip
        tell(
            f"claims, {confirmation}, {rounds} rounds: {num} campaigns in each of {len(worlds)} worlds and two designs"
        )
        found += levels(worlds, list(DESIGNS), confirmation, rounds, num)
    tell("claims: power")
    tables: dict[str, Any] = {
        "levels": [asdict(each) for each in found],
        "power": [asdict(each) for name in (RUNNING, DOUBLED, FINAL_ROUND) for each in powers(name, num)],
        "ruinous": list(ruinous(num)),
    }
    if num_real:
        tell(f"claims: {num_real} campaigns of each null world by the real code")
        tables["real"] = real(found, num_real, tell)
    return tables


def real(found: Sequence[Level], num: int, tell: Progress) -> dict[str, Any]:
    """Null campaigns by the real code, and one binomial test of whether they claim as often as the twin says."""
    rates, rows = [], []
    for level in found:
        if (level.confirmation, level.rounds) != (RUNNING, 4) or level.world not in NULLS:
            continue
        size = replace(DESIGNS[level.design], board_rows=0, submissions=0)
        first = zlib.crc32(
            f"{level.design}/{level.world}".encode()
        )  # luck is drawn by number: no world repeats that of another
        said = [claim_check.campaign(NULLS[level.world], size, RUNNING, first + number) for number in range(num)]
        row = {key: sum(getattr(each, key) for each in said) for key in REAL}
        rows.append({"design": level.design, "world": level.world, **row})
        rates.append(level.claimed)
        tell(f"  {level.design}, {level.world}: {row}")
    total, expected = sum(row["claimed"] for row in rows), float(np.mean(rates))
    return {
        "campaigns": num * len(rows), "claimed": total, "twin_rate": round(expected, 4), "rows": rows,
        "p_value": round(float(binomtest(total, num * len(rows), expected).pvalue), 4),
        "twin_disagrees": num * len(rows) - sum(row["agrees"] for row in rows),
    }  # fmt: skip


def explained(tables: Mapping[str, Any]) -> Iterator[tuple[list[list[str]], str]]:
    """Each table as a header and lines, and the sentence that explains it."""
    yield (
        level_lines(tables),
        "Shares of campaigns, with the one-sided 95 % bound. claimed: an improvement, at most 5 % where nothing has an effect. worse: something is "
        "shown to be worse, at most 5 %. suspect: two canaries fire for a family, at most 1 %. BEYOND: the bound is above that limit. too few: so "
        "few campaigns cannot tell, because the bound would be above the limit even if none of them said it. set aside has no error rate.",
    )
    yield (
        power_lines(tables),
        "A setting has this effect in round 1: how often it is kept then, is kept and an improvement is claimed by round 3 or 4, and is claimed "
        "where it stands in round 4.",
    )
    yield (
        ruinous_lines(tables),
        "One arm loses so much: how often it is shown to be worse, if it runs in round 1 or in round 3.",
    )
    if "real" in tables:
        real_found = tables["real"]
        rows = [["design", "world", *REAL]] + [
            [row["design"], row["world"], *(str(row[key]) for key in REAL)] for row in real_found["rows"]
        ]
        yield (
            rows,
            f"The real code claimed in {real_found['claimed']} of {real_found['campaigns']} null campaigns, the twin's rate is "
            f"{real_found['twin_rate']} (binomial test: p {real_found['p_value']}); on their runs the twin disagreed in "
            f"{real_found['twin_disagrees']}.",
        )


def level_lines(tables: Mapping[str, Any]) -> list[list[str]]:
    """A header, then a line for each world, with "BEYOND" and what is beyond its limit, or what so few campaigns cannot tell."""
    rows = [["design", "confirmation", "rounds", "world", "claimed", "worse", "suspect", "set aside", ""]]
    for row in tables["levels"]:
        shares = [f"{row[key]:.4f} ({row['upper'][key]:.4f})" for key in LIMITS]
        few = [key for key in LIMITS if not is_enough(row["campaigns"], key) and key not in row["beyond"]]
        words = [f"BEYOND {', '.join(row['beyond'])}"] * bool(row["beyond"]) + [f"too few for {', '.join(few)}"] * bool(
            few
        )
        verdict = "; ".join(words)
        named = [row["design"], row["confirmation"], str(row["rounds"]), row["world"]]
        rows.append([*named, *shares, f"{row['set_aside']:.2f}", verdict])
    return rows


def is_enough(campaigns: int, key: str) -> bool:
    """Whether so many campaigns can show that a share is within its limit: the bound is below it if none of them says it."""
    return upper_95(0, campaigns) <= LIMITS[key]


def power_lines(tables: Mapping[str, Any]) -> list[list[str]]:
    """A header, then a line for each planted setting."""
    header = ["design", "confirmation", "sd", "effect", "kept", "claimed by 3", "by 4", "if it stands"]
    return [header] + [
        [row["design"], row["confirmation"], f"{row['seed_sd']:g}", f"{100 * row['effect']:+.0f} points"]
        + [f"{row[key]:.2f}" for key in ("kept", "by_round_3", "by_round_4", "if_it_stands")]
        for row in tables["power"]
    ]


def ruinous_lines(tables: Mapping[str, Any]) -> list[list[str]]:
    """A header, then a line for each ruinous arm."""
    return [["design", "sd", "effect", "round 1", "round 3"]] + [
        [
            row["design"],
            f"{row['seed_sd']:g}",
            f"{100 * row['effect']:+.0f} points",
            f"{row['round_1']:.2f}",
            f"{row['round_3']:.2f}",
        ]
        for row in tables["ruinous"]
    ]
