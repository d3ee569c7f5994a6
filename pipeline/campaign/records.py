"""The nouns of a campaign: frozen values that stages hand to one another through files, and nothing else.

    Policy --plan--> Plan of Arms --worker--> Outcome (one an arm) --evidence--> Evidence --decide--> Decision --> next Policy

Numbers that a decision rests on are exact: counts are integers, ratios `fractions.Fraction`, axis values decimal strings; no
record holds a float, a time or a host, so that the same inputs give the same bytes anywhere (docs/contract.md, contract 24).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any, ClassVar

NUM_ARMS = 8
ROLES = ("anchor", "replicate", "axis", "contrast", "repair", "control", "reference", "base")
"""`reference` and `base` stand in r0000 alone: the a0 recipe trained once, and the image as it is, evaluated without training."""
SETS = ("dev", "fresh")
"""The item sets that every arm is scored on: dev stays for the campaign, fresh is new in each round."""

Setting = tuple[str, str]
"""One override: a dotted configuration key and its value as a string, such as ("recipe.learning_rate", "0.0071")."""


def with_setting(settings: tuple[Setting, ...], setting: Setting) -> tuple[Setting, ...]:
    """Settings in which `setting` replaces what stood under its key, moved to the end."""
    return tuple(other for other in settings if other[0] != setting[0]) + (setting,)


@dataclass(frozen=True)
class Arm:
    """One of the eight: which recipe, under which seed, and why it is in the plan.

    `overrides` apply to the reference recipe, in order. `axis` names the axis that an `axis` arm moves (of a `contrast` the family); its
    moved setting is the last override. `replicate_of` names the recipe that this arm repeats: "reference", "standing" or "control".
    """

    index: int
    role: str
    seed: int
    overrides: tuple[Setting, ...] = ()
    axis: str | None = None
    replicate_of: str | None = None

    @property
    def name(self) -> str:
        return f"a{self.index}"


@dataclass(frozen=True)
class Axis:
    """One thing a campaign may vary. `kind` is log, linear, int or choice; low and high are decimal strings."""

    name: str
    key: str
    kind: str
    low: str = ""
    high: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contrast:
    """An intervention that is registered before it runs: the key that is halved for a family's sake, and what that is expected to show."""

    family: str
    key: str
    expects: str = "dev_falls_fresh_holds"


@dataclass(frozen=True)
class Policy:
    """What passes from round to round, and the only thing that does: settings, never weights.

    `quiet`: of each axis, how many looks in a row gained nothing. `retired`: axes that stay out. `replicates`: repeats of the
    standing recipe that were bought instead of axes. `contrasts`: see there. `control`: the recipe that the objective as it was before
    a family became suspect would have made standing, None while there is no difference. `repaired`: families whose dev items are
    new, each with the round from which on.
    """

    standing: tuple[Setting, ...]
    axes: tuple[Axis, ...]
    dead_ends: tuple[Setting, ...] = ()
    quiet: tuple[tuple[str, int], ...] = ()
    retired: tuple[str, ...] = ()
    replicates: int = 0
    contrasts: tuple[Contrast, ...] = ()
    control: tuple[Setting, ...] | None = None
    repaired: tuple[tuple[str, str], ...] = ()

    PAIRS: ClassVar[Mapping[str, tuple[str, str]]] = {
        "standing": ("key", "value"),
        "dead_ends": ("key", "value"),
        "quiet": ("axis", "looks"),
        "repaired": ("family", "round"),
    }
    """Fields that hold pairs, with the names that the two have in an override file, where Hydra wants mappings."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Policy:
        """A policy as plans and decisions hold it (`asdict`). Raises ValueError, KeyError or TypeError for what is no policy."""
        fields = dict(data)
        fields["axes"] = tuple(Axis(**{**axis, "choices": tuple(axis["choices"])}) for axis in data["axes"])
        fields["contrasts"] = tuple(Contrast(**each) for each in data["contrasts"])
        fields["control"] = None if data["control"] is None else _pairs(data["control"])
        fields["retired"] = tuple(data["retired"])
        for name in cls.PAIRS:
            fields[name] = _pairs(data[name])
        return cls(**fields)

    def to_hydra(self) -> dict[str, Any]:
        """The `policy` part of a round's override file. Axes are not in it: a person chose them in the configuration."""
        return {
            **{name: _entries(names, getattr(self, name)) for name, names in self.PAIRS.items()},
            "retired": list(self.retired),
            "replicates": self.replicates,
            "contrasts": [asdict(each) for each in self.contrasts],
            "has_control": self.control is not None,  # Hydra has no list that may be null
            "control": _entries(self.PAIRS["standing"], self.control or ()),
        }

    @classmethod
    def from_hydra(cls, data: Mapping[str, Any]) -> Policy:
        """The `policy` part of a composed configuration: what `to_hydra` writes, and the axes."""
        lists = {
            name: [tuple(entry[each] for each in names) for entry in data[name]] for name, names in cls.PAIRS.items()
        }
        control = [(entry["key"], entry["value"]) for entry in data["control"]] if data["has_control"] else None
        others = {name: data[name] for name in ("axes", "retired", "replicates", "contrasts")}
        return cls.from_json({**lists, **others, "control": control})


def _pairs(data: Iterable[Any]) -> tuple[tuple[Any, Any], ...]:
    return tuple((first, second) for first, second in data)


def _entries(names: tuple[str, str], pairs: Iterable[tuple[Any, Any]]) -> list[dict[str, Any]]:
    return [dict(zip(names, pair, strict=True)) for pair in pairs]


@dataclass(frozen=True)
class Plan:
    """What a round will do, frozen before anything is submitted; jobs get its sha256 as an argument and compare."""

    campaign: str
    round: str
    image_digest: str
    constitution_digest: str
    code_digest: str
    config_digest: str
    policy: Policy
    arms: tuple[Arm, ...]

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Raises ValueError, KeyError or TypeError for what is not a plan of this schema."""
        fields = dict(data)
        if fields.pop("schema", None) != 1:
            raise ValueError(f"schema {data.get('schema')!r} is not 1")
        arms = tuple(
            Arm(**{**arm, "overrides": tuple((key, value) for key, value in arm["overrides"])})
            for arm in fields.pop("arms")
        )
        return cls(policy=Policy.from_json(fields.pop("policy")), arms=arms, **fields)


@dataclass(frozen=True)
class Outcome:
    """What one arm came to, as the decision sees it.

    `outcomes[set][family]` is a string with one character an item in item-id order: 1 right, 0 wrong, T truncated (and so wrong).
    A failed arm has no sets at all: a crash has no score. `status` is completed, failed or absent.
    """

    arm: str
    role: str
    status: str
    exit_class: str
    result_digest: str = ""
    adapter_digest: str = ""
    outcomes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def scored(self, item_set: str) -> bool:
        return self.status == "completed" and bool(self.outcomes.get(item_set))

    def right(self, item_set: str, families: Iterable[str] | None = None) -> tuple[int, int]:
        """(bits, items): a bit an item, 1 where it is right, families in name order: the order in which two arms of one set are paired."""
        found = self.outcomes[item_set]
        marks = "".join(found[family] for family in sorted(found if families is None else families))
        return int(marks.replace("T", "0") or "0", 2), len(marks)


@dataclass(frozen=True)
class Lift:
    """Score of an arm minus that of its baseline on the same items, with the variance of that difference (both exact).

    `baseline` is "reference", or "standing" for a lift over this round's run of the standing recipe.
    `variance` is that of the item mean: sum of squared deviations of the paired differences / (n (n-1)).
    """

    arm: str
    baseline: str
    item_set: str
    num_items: int
    mean: Fraction
    variance: Fraction


@dataclass(frozen=True)
class FamilyState:
    """`clean_looks` counts those since a repair or a suspicion; `was_restored` outlives a TRUSTED round. `code` says what moved it."""

    name: str = "UNPROVEN"
    clean_looks: int = 0
    was_restored: bool = False
    code: str = "start"


@dataclass(frozen=True)
class Decision:
    """What the round changed. `kept` is the promoted arm or None, `policy` the next round's; `reasons` name the article of every step.

    `winner`: (round, arm) with the campaign's largest value so far. `ladder`: the board score that workers and proposers may know.
    `claimed`: whether what is kept is above noise; else it is provisional.
    """

    round: str
    state: str
    kept: str | None
    policy: Policy
    reasons: tuple[str, ...]
    families: Mapping[str, FamilyState] = field(default_factory=dict)
    external: str = "EXTERNAL-CLEAR"
    winner: tuple[str, str] | None = None
    ladder: str = ""
    claimed: bool = False
