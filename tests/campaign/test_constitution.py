"""Test the constitution: one changed byte changes its digest, and it allows the listed settings and refuses all others."""

import re
import shutil
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.campaign import constitution, facts
from pipeline.campaign.errors import ConfigError, IntegrityError, Refused
from pipeline.config import settings
from pipeline.decision import plan

RULES = facts.load_constitution()
OPEN = RULES.articles["2"]["keys"]
NUMERIC = sorted(key for key, rule in OPEN.items() if rule["type"] != "choice")
COUNTS = sorted(key for key, rule in OPEN.items() if rule["type"] == "integer")
HOSTILE = (
    "",
    " 1",
    "1 ",
    "1\n",
    "+1",
    "1e0",
    "1_0",
    "0x1",
    "nan",
    "inf",
    "-inf",
    "1.",
    ".5",
    "1,0",
    "١",
    "1" * 13,
    "${seed}",
    "1;2",
)


def refusal(key: str, value: object) -> str:
    with pytest.raises(Refused) as refused:
        RULES.check_settings([(key, value)])  # type: ignore[list-item]
    assert (refused.value.article, refused.value.exit_code) == ("2", 3)
    assert key in str(refused.value) or repr(key) in str(refused.value)
    return refused.value.code


@pytest.fixture
def copy(tmp_path):
    """The constitution's folder, to be changed."""
    return shutil.copytree(constitution.HERE, tmp_path / "constitution")


def test_any_changed_byte_is_an_integrity_error(copy):
    path = copy / "constitution.yaml"
    whole = path.read_bytes()
    for position in [*range(0, len(whole), 50), len(whole) - 1]:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(IntegrityError, match="constitution.yaml has digest .* needs a new campaign"):
            facts.load_constitution(folder=copy)


def test_another_constitution_than_the_campaigns_is_refused(copy):
    assert facts.load_constitution(RULES.digest, copy).digest == RULES.digest
    with pytest.raises(IntegrityError, match="the campaign's frozen digest says 000"):
        facts.load_constitution("0" * 64, copy)


def test_a_link_or_an_absent_file_is_refused(copy):
    path = copy / "constitution.yaml"
    path.rename(copy / "elsewhere.yaml")
    with pytest.raises(IntegrityError, match="cannot read the constitution in .*No such file"):
        facts.load_constitution(folder=copy)
    path.symlink_to(copy / "elsewhere.yaml")
    with pytest.raises(IntegrityError, match="is a symbolic link"):
        facts.load_constitution(folder=copy)


def test_questions_have_answers_that_fit_the_eight_arms():
    assert 1 < RULES.quorum <= RULES.arms_per_round == 8
    assert RULES.num_rounds >= 4
    assert 0 < RULES.first_round_replicates < 7
    assert RULES.z > 0


def test_every_open_key_exists_and_the_reference_recipe_lies_inside():
    """A method's own numbers are keys of its recipe alone, the shares of six families those of the full tasks."""
    everywhere = [["recipe=sft_lora"], ["recipe=grpo"], ["experiment=nano_30b"]]
    composed = [settings.compose(overrides) for overrides in everywhere]
    assert len(OPEN) >= 10
    for key in OPEN:
        values = [value for chosen in composed for value in _value(chosen, key)]
        assert values, f"{key} is a key of no configuration"
        RULES.check_settings([(key, value) for value in values])


def _value(chosen, key: str) -> list[str]:
    try:
        return [settings.value_of(chosen, key)]
    except ConfigError:
        return []


def test_every_value_of_every_shipped_axis_is_allowed():
    axes = settings.policy_of(settings.compose()).axes
    assert len(axes) >= 7
    for axis, base in zip(axes, plan.PRIMES, strict=False):
        RULES.check_settings([(axis.key, plan.axis_value(axis, index, base)) for index in range(1, 65)])


@given(st.sampled_from(sorted(set(NUMERIC) - set(COUNTS))), st.decimals(-100, 2000, allow_nan=False, places=6))
def test_a_decimal_is_allowed_exactly_inside_its_range(key, value):
    rule = OPEN[key]
    if Decimal(rule["low"]) <= value <= Decimal(rule["high"]):
        RULES.check_settings([(key, format(value, "f"))])
    else:
        assert refusal(key, format(value, "f")) == "out_of_range"


@given(st.sampled_from(COUNTS), st.integers(-100, 2000))
def test_an_integer_is_allowed_exactly_inside_its_range(key, value):
    rule = OPEN[key]
    if int(rule["low"]) <= value <= int(rule["high"]):
        RULES.check_settings([(key, str(value))])
    else:
        assert refusal(key, str(value)) == "out_of_range"


@pytest.mark.parametrize("key", NUMERIC)
def test_the_ends_of_a_range_belong_to_it(key):
    RULES.check_settings([(key, OPEN[key]["low"]), (key, OPEN[key]["high"])])


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("key", ["recipe.learning_rate", "recipe.lora.rank"])
def test_numbers_have_one_plain_spelling(key, value):
    assert refusal(key, value) == "not_a_number"


@given(st.sampled_from(COUNTS), st.text(max_size=6))
def test_no_other_text_is_an_integer(key, text):
    if not (text.isascii() and text.removeprefix("-").isdigit()):
        assert refusal(key, text) == "not_a_number"


def test_an_integer_key_takes_no_fraction():
    assert refusal("recipe.lora.rank", "8.5") == "not_a_number"


def test_a_choice_is_one_of_its_list():
    RULES.check_settings([("recipe.trace_style", "short")])
    for value in ("Short", "short ", "", "none"):
        assert refusal("recipe.trace_style", value) == "not_a_choice"


@pytest.mark.parametrize("value", [8, 0.5, True, None, ["8"]])
def test_a_value_that_is_no_string_is_refused(value):
    assert refusal("recipe.lora.rank", value) == "wrong_type"


@given(
    st.text(max_size=30)
    | st.sampled_from(["recipe.num_steps", "recipe.batch_size", "tasks.level", "recipe", "seed", "recipe.lora"])
)
def test_every_other_key_is_closed(key):
    if key not in OPEN:
        assert refusal(key, "8") == "closed_key"


def test_the_first_of_several_faults_is_named():
    with pytest.raises(Refused, match="recipe.num_steps"):
        RULES.check_settings([("recipe.lora.rank", "8"), ("recipe.num_steps", "9"), ("recipe.lora.rank", "99")])


def test_a_round_beyond_the_budget_is_refused():
    RULES.check_round(RULES.num_rounds, RULES.num_rounds)
    with pytest.raises(Refused, match="article 4 .rounds_spent.: round 9 is beyond the campaign's 8 rounds"):
        RULES.check_round(9, RULES.num_rounds)
    with pytest.raises(
        Refused, match="round 5 is beyond the campaign's 4 rounds, over which its error rates are spent"
    ):
        RULES.check_round(5, 4)


def test_the_level_of_claims_is_that_of_the_largest_number_of_rounds_not_above():
    levels = {int(rounds): Fraction(level) for rounds, level in RULES.articles["7"]["claim_levels"].items()}
    for rounds in range(1, 13):
        below = [known for known in levels if known <= rounds] or [min(levels)]
        assert RULES.claim_level(rounds) == levels[max(below)]


def test_a_probe_that_tried_less_is_refused_by_article_6() -> None:
    rules = facts.load_constitution()
    article = rules.articles["6"]
    several = {name: {"reached": False} for name in article["checks"]}
    one = several | {name: {"reached": False} for name in article["checks_on_one_node"]}
    rules.check_coverage(one, 1)
    rules.check_coverage(several, 2)
    with pytest.raises(Refused, match="article 6.*namespace net"):
        rules.check_coverage(several, 1)
    for name in one:
        with pytest.raises(Refused, match=f"article 6.*lacks {re.escape(name)}"):
            rules.check_coverage({**one, name: {"reached": True}}, 1)
        with pytest.raises(Refused, match=re.escape(name)):
            rules.check_coverage({key: check for key, check in one.items() if key != name}, 1)
