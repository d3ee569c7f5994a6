"""Test the tools: their schemas are plain JSON schemas, and the check of arguments agrees with them."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from substrate.agent.tool_schemas import fault_of, schemas, tools
from tests.support.agent_peer import MANIFEST

AXIS = "learning_rate"
VALID = {
    "list": [{"path": "."}, {"path": "substrate/recipes"}],
    "read": [{"path": "a"}, {"path": "a", "first_line": 7, "num_lines": 10_000}],
    "search": [{"pattern": "def (.*"}, {"pattern": "", "path": "substrate"}],
    "write": [{"path": "a", "content": ""}, {"path": "a", "content": "é\n\x00" * 9}],
    "patch": [{"path": "a", "old": "b", "new": ""}],
    "run": [{"command": "ls"}, {"command": "ls", "seconds": 1}],
    "train": [{"num_steps": None, "why": ""}, {"num_steps": 3, "why": "smoke"}],
    "finish": [
        MANIFEST,
        MANIFEST
        | {"tried": [], "failed": [{"what": "a", "kind": "smoke", "repaired": True}], "equivalent_settings": []},
    ],
}
WRONG = [
    ("list", {}, "the arguments must have path; came: none"),
    ("list", {"path": ""}, "path has 0 characters; valid are 1 or more"),
    ("list", {"path": None}, "path must be of type string"),
    ("list", {"path": "a\ud800"}, "path has a character that is not Unicode"),
    ("read", {"path": "a", "first_line": 0}, "first_line must be at least 1"),
    ("read", {"path": "a", "first_line": "1"}, "first_line must be of type integer"),
    ("read", {"path": "a", "first_line": 1.0}, "first_line must be of type integer"),
    ("read", {"path": "a", "num_lines": 10_001}, "num_lines must be at least 1 and at most 10000"),
    ("read", {"path": "a", "offset": 1}, "must have path, and may have first_line, num_lines; came: offset, path"),
    ("search", {"pattern": "x" * 501}, "pattern has 501 characters; valid are 0 to 500"),
    ("patch", {"path": "a", "old": "", "new": "b"}, "old has 0 characters"),
    ("run", {"command": ["ls"]}, "command must be of type string"),
    ("train", {"num_steps": True, "why": ""}, "num_steps must be of type integer or null"),
    ("train", {"num_steps": 0, "why": ""}, "num_steps must be at least 1"),
    ("train", {"num_steps": 3}, "must have num_steps, why; came: num_steps"),
    ("finish", MANIFEST | {"axis": None}, "axis must be of type string"),
    ("finish", MANIFEST | {"axis": "clip_norm"}, "axis must be one of learning_rate"),
    ("finish", MANIFEST | {"change": "magic"}, "change must be one of none, data, loss"),
    ("finish", MANIFEST | {"hypothesis": "x" * 601}, "hypothesis has 601 characters; valid are 0 to 600"),
    ("finish", MANIFEST | {"tried": MANIFEST["tried"] * 21}, "tried has 21 entries; valid are 0 to 20"),
    ("finish", MANIFEST | {"tried": [{"what": "a"}]}, "tried[0] must have what, outcome; came: what"),
    ("finish", MANIFEST | {"tried": [{"what": "a", "outcome": "great"}]}, "tried[0].outcome must be one of better"),
    (
        "finish",
        MANIFEST | {"failed": [{"what": "a", "kind": "edit", "repaired": 1}]},
        "failed[0].repaired must be of type boolean",
    ),
    ("finish", MANIFEST | {"checkpoint": {"choice": "best"}}, "checkpoint must have choice, why"),
    ("finish", MANIFEST | {"equivalent_settings": [["a"]]}, "equivalent_settings[0] has 1 entries; valid are 2 to 2"),
    ("finish", MANIFEST | {"equivalent_settings": [["a", 1]]}, "equivalent_settings[0][1] must be of type string"),
]


@pytest.mark.parametrize("name", VALID)
def test_valid_arguments_pass(name):
    assert [fault_of(name, given, AXIS) for given in VALID[name]] == [None] * len(VALID[name])


@pytest.mark.parametrize(("name", "given", "message"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_wrong_arguments_are_named(name, given, message):
    code, what = fault_of(name, given, AXIS)
    assert code == "bad_arguments" and message in what and what.isprintable()


def test_every_tool_was_tried():
    assert list(VALID) == [tool["function"]["name"] for tool in tools(AXIS)] == list(schemas(AXIS))
    assert {name for name, _, _ in WRONG} >= set(VALID) - {"write"}


def test_an_arm_without_an_axis_says_null():
    assert fault_of("finish", MANIFEST | {"axis": None}, None) is None
    assert fault_of("finish", MANIFEST, None)[0] == "bad_arguments"


def test_an_unknown_tool_is_named_with_the_valid_ones():
    assert fault_of("python", {}, AXIS) == (
        "unknown_tool",
        f"there is no tool python; the tools are {', '.join(VALID)}",
    )


def nodes(schema: dict) -> list[dict]:
    inner = [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]
    return [schema, *(node for each in inner for node in nodes(each))]


def test_the_schemas_are_strict_and_use_few_keywords():
    """Servers translate a schema to a grammar, and know few keywords."""
    text = json.dumps(tools(AXIS))
    assert json.loads(text) == tools(AXIS) and text.isascii()
    known = {
        "type", "properties", "required", "additionalProperties", "description", "enum", "default", "items", "minimum", "maximum",
        "minLength", "maxLength", "minItems", "maxItems",
    }  # fmt: skip
    for _, schema in schemas(AXIS).values():
        for node in nodes(schema):
            assert set(node) <= known
            if node["type"] == "object":
                assert node["additionalProperties"] is False and set(node["required"]) <= set(node["properties"])
    assert all(description.endswith(".") for description, _ in schemas(AXIS).values())


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec=None), max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(list(VALID)), st.dictionaries(st.text(max_size=9), JSON, max_size=3))
def test_any_object_is_judged_without_an_exception(name, arguments):
    assert fault_of(name, arguments, AXIS) is None or fault_of(name, arguments, AXIS)[1]


@given(st.data())
def test_a_valid_call_with_one_value_of_another_type_is_refused(data):
    name = data.draw(st.sampled_from(list(VALID)))
    arguments = copy.deepcopy(data.draw(st.sampled_from(VALID[name])))
    key = data.draw(st.sampled_from(list(arguments)))
    value = data.draw(JSON.filter(lambda value: type(value) not in {type(arguments[key]), int, type(None)}))
    assert fault_of(name, arguments | {key: value}, AXIS)[0] == "bad_arguments"
