"""The values that stages pass to one another through files, as frozen dataclasses.

    Policy --plan--> Plan of Arms --worker--> Outcome (one an arm) --evidence--> Evidence --decide--> Decision --> next Policy

Numbers that a decision rests on are exact: counts are integers, ratios are `fractions.Fraction`, axis values are decimal strings. No
value holds a float, a time or a host name, so the same inputs give the same bytes on every machine (docs/contract.md, contract 24).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any, ClassVar

NUM_ARMS = 8
ROLES = ("anchor", "replicate", "axis", "contrast", "repair", "control", "reference", "base")
"""Why an arm is in a plan. Only r0000 has `reference` (the recipe of a0, trained once) and `base` (the model without training)."""
SETS = ("dev", "fresh")
"""The item sets that every arm is scored on: dev stays the same for the campaign, fresh is new in each round."""

Setting = tuple[str, str]
"""One override: a dotted configuration key and its value as a string, such as ("recipe.learning_rate", "0.0071")."""


def with_setting(settings: tuple[Setting, ...], setting: Setting) -> tuple[Setting, ...]:
    """Return `settings` with `setting` at the end and without any earlier value of its key."""
    return tuple(other for other in settings if other[0] != setting[0]) + (setting,)


@dataclass(frozen=True)
class Arm:
    """One training run of a round: which recipe, with which seed, and why it is in the plan (`role`, one of ROLES).

    `overrides` apply to the reference recipe, in order. `axis` names the axis that an `axis` arm moves, or the family of a `contrast`;
    the moved setting is the last override. `replicate_of` names the recipe that this arm repeats: "reference", "standing" or "control".
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
    """One thing that a campaign may vary. `kind` is log, linear, int or choice; `low` and `high` are decimal strings."""

    name: str
    key: str
    kind: str
    low: str = ""
    high: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contrast:
    """An experiment that is registered before it runs: the key whose value is halved for a family, and the expected result."""

    family: str
    key: str
    expects: str = "dev_falls_fresh_holds"


@dataclass(frozen=True)
class Policy:
    """Everything that passes from one round to the next. It holds settings and never weights.

    `dead_ends`: settings that are shown to be worse; nobody tries them again. `set_aside`: settings that one run suggests to be worse;
    the planner skips them, and a proposal may try them again. `tried`: every setting that an axis arm was given, oldest first; one that
    came twice is there twice. `quiet`: for each axis, in how many looks in a row it gained nothing.
    `retired`: axes that get no more arms. `replicates`: arms that repeat the standing recipe in place of axis arms. `control`: the recipe
    that the old objective, before a family became suspect, would keep; None while both objectives keep the same. `repaired`: (family,
    round) of families with new dev items, and the first round that uses them.
    """

    standing: tuple[Setting, ...]
    axes: tuple[Axis, ...]
    dead_ends: tuple[Setting, ...] = ()
    set_aside: tuple[Setting, ...] = ()
    tried: tuple[Setting, ...] = ()
    quiet: tuple[tuple[str, int], ...] = ()
    retired: tuple[str, ...] = ()
    replicates: int = 0
    contrasts: tuple[Contrast, ...] = ()
    control: tuple[Setting, ...] | None = None
    repaired: tuple[tuple[str, str], ...] = ()

    PAIRS: ClassVar[Mapping[str, tuple[str, str]]] = {
        "standing": ("key", "value"),
        "dead_ends": ("key", "value"),
        "set_aside": ("key", "value"),
        "tried": ("key", "value"),
        "quiet": ("axis", "looks"),
        "repaired": ("family", "round"),
    }
    """The fields that hold pairs, with the names of the two parts in an override file, where Hydra needs mappings."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Policy:
        """Read a policy from the JSON of a plan or decision (`asdict`). Raises ValueError, KeyError or TypeError for other content."""
        fields = dict(data)
        fields["axes"] = tuple(Axis(**{**axis, "choices": tuple(axis["choices"])}) for axis in data["axes"])
        fields["contrasts"] = tuple(Contrast(**contrast) for contrast in data["contrasts"])
        fields["control"] = None if data["control"] is None else _pairs(data["control"])
        fields["retired"] = tuple(data["retired"])
        for name in cls.PAIRS:
            fields[name] = _pairs(data[name])
        return cls(**fields)

    def to_hydra(self) -> dict[str, Any]:
        """Return the `policy` part of a round's override file. It leaves out the axes, which a person chose in the configuration."""
        return {
            **{name: _entries(names, getattr(self, name)) for name, names in self.PAIRS.items()},
            "retired": list(self.retired),
            "replicates": self.replicates,
            "contrasts": [asdict(contrast) for contrast in self.contrasts],
            "has_control": self.control is not None,  # Hydra has no list that may be null
            "control": _entries(self.PAIRS["standing"], self.control or ()),
        }

    @classmethod
    def from_hydra(cls, data: Mapping[str, Any]) -> Policy:
        """Read the `policy` part of a composed configuration: what `to_hydra` writes, and the axes."""
        lists = {
            name: [tuple(entry[part] for part in names) for entry in data[name]] for name, names in cls.PAIRS.items()
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
    """What a round will do, frozen before any job is submitted. Jobs get its sha256 as an argument and compare it."""

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
        """Read a plan. Raises ValueError, KeyError or TypeError for content that is not a plan of this schema."""
        fields = dict(data)
        if fields.pop("schema", None) != 1:
            raise ValueError(f"its schema is {data.get('schema')!r}, and this version reads schema 1")
        arms = tuple(
            Arm(**{**arm, "overrides": tuple((key, value) for key, value in arm["overrides"])})
            for arm in fields.pop("arms")
        )
        return cls(policy=Policy.from_json(fields.pop("policy")), arms=arms, **fields)


@dataclass(frozen=True)
class Outcome:
    """How one arm ended, as the decision sees it. `status` is completed, failed or absent.

    `outcomes[set][family]` is a string with one character per item in item-id order: 1 for right, 0 for wrong, T for truncated, which
    counts as wrong. A failed arm has no sets: a crash has no score. `edited` says that an agent's fork differed from the image when it
    trained, so that the score belongs to no recipe (article 16).
    """

    arm: str
    role: str
    status: str
    exit_class: str
    result_digest: str = ""
    adapter_digest: str = ""
    outcomes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    edited: bool = False

    def scored(self, item_set: str) -> bool:
        """Whether the arm completed and has outcomes on this set."""
        return self.status == "completed" and bool(self.outcomes.get(item_set))

    def right(self, item_set: str, families: Iterable[str] | None = None) -> tuple[int, int]:
        """Return (bits, number of items). The bits are one integer with one bit per item, 1 for right, the first item the highest.

        Families come in name order, so equal positions of two arms on one set are the same item. families: all of them for None.
        """
        by_family = self.outcomes[item_set]
        bits, num_items = 0, 0
        for family in sorted(by_family if families is None else families):
            if (item_set, family) not in self._right:
                self._right[item_set, family] = int(by_family[family].replace("T", "0") or "0", 2)
            bits = bits << len(by_family[family]) | self._right[item_set, family]
            num_items += len(by_family[family])
        return bits, num_items

    def num_right(self, item_set: str) -> Mapping[str, int]:
        """The number of right answers of each family."""
        if item_set not in self._num_right:
            self._num_right[item_set] = {
                family: self.right(item_set, [family])[0].bit_count() for family in self.outcomes[item_set]
            }
        return self._num_right[item_set]

    @cached_property
    def _right(self) -> dict[tuple[str, str], int]:
        """The bits of the sets and families that were asked for: every later round asks again."""
        return {}

    @cached_property
    def _num_right(self) -> dict[str, dict[str, int]]:
        """What `num_right` returned, by set."""
        return {}


@dataclass(frozen=True)
class Lift:
    """The score of an arm minus that of its baseline on the same items, and the variance of this difference, both exact.

    `baseline` is "reference", or "standing" for this round's run of the standing recipe, or "control". `mean` is a share from -1 to 1.
    `variance` is that of the mean over items: the sum of squared deviations of the n paired differences, divided by n (n - 1).
    """

    arm: str
    baseline: str
    item_set: str
    num_items: int
    mean: Fraction
    variance: Fraction


@dataclass(frozen=True)
class FamilyState:
    """What may be done with a family's dev score (docs/glossary.md, family state).

    `clean_looks` counts the looks without a sign since a repair or suspicion. `was_restored` stays true through a TRUSTED round. `code`
    says what caused the last change.
    """

    name: str = "UNPROVEN"
    clean_looks: int = 0
    was_restored: bool = False
    code: str = "start"


@dataclass(frozen=True)
class Decision:
    """What a round changed. `kept` is the arm whose axis joins the standing recipe, or None; `policy` is the next round's.

    `reasons`: one sentence per step, with the number of its article. `winner`: (round, arm) with the largest value of the campaign so
    far. `ladder`: the board score that workers and proposers may know. `claimed`: whether this round
    claims an improvement of the standing recipe over the reference.
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
