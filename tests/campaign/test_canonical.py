"""Test that our encoder agrees with rfc8785, which auditors use, and that the YAML we write is read back unchanged."""

import json

import pytest
import rfc8785
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.campaign import canonical, constitution, facts
from pipeline.campaign.strict_json import Numbers, read
from pipeline.config import settings

texts = st.text(st.characters(codec="utf-8"), max_size=8)  # astral characters too, which sort otherwise in UTF-16
values = st.recursive(
    st.none() | st.booleans() | st.integers(-canonical.LARGEST, canonical.LARGEST) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)


@given(values)
def test_bytes_are_those_of_rfc8785(value):
    assert canonical.encoded(value) == rfc8785.dumps(value)
    assert read(canonical.encoded(value), numbers=Numbers.WHOLE) == value


def test_keys_sort_by_their_utf_16_units():
    value = {"\U0001f600": 1, "\ufb01": 2, "z": 3}
    assert list(read(canonical.encoded(value), numbers=Numbers.WHOLE)) == ["z", "\U0001f600", "\ufb01"]
    assert canonical.encoded(value) == rfc8785.dumps(value)


@pytest.mark.parametrize("value", [2**53, -(2**53)])
def test_what_rfc8785_refuses_is_refused(value):
    for encode in (canonical.encoded, rfc8785.dumps):
        with pytest.raises(ValueError):
            encode([value])
    with pytest.raises(ValueError):
        read(b"[%d]" % value, numbers=Numbers.WHOLE)


keys = st.text("abcdefgh_", min_size=1, max_size=6)
low_texts = st.text(st.characters(codec="utf-8", max_codepoint=0xD7FF), max_size=8)
plain_yaml = st.recursive(
    low_texts | st.integers(0, 10**9) | st.booleans(),
    lambda inner: (
        st.lists(low_texts | st.dictionaries(keys, low_texts, min_size=1, max_size=3), max_size=3)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(
        keys.filter(lambda key: key not in ("n", "y", "null", "no", "on", "off", "yes")), plain_yaml, max_size=4
    )
)
def test_override_files_are_read_as_what_was_written(content):
    text = canonical.overrides_text(content)
    assert text.startswith("# @package _global_\n")
    try:
        assert (yaml.safe_load(text) or {}) == content
    except yaml.reader.ReaderError:
        assert not text.isprintable()  # PyYAML refuses a few control characters, which no setting may hold


def test_override_files_are_for_people():
    policy = {
        "standing": [{"key": "recipe.lora.rank", "value": "8"}],
        "retired": [],
        "replicates": 0,
        "has_control": False,
    }
    assert canonical.overrides_text({"round": "r0002", "policy": policy}) == (
        "# @package _global_\n"
        "policy:\n"
        "  has_control: false\n"
        "  replicates: 0\n"
        "  retired: []\n"
        "  standing:\n"
        '  - key: "recipe.lora.rank"\n'
        '    value: "8"\n'
        'round: "r0002"\n'
    )


def test_plain_lines_of_a_configuration_are_what_a_yaml_reader_finds():
    text = settings.to_yaml(settings.compose(["experiment=nano_30b"]))

    def walk(value, path=()):
        if isinstance(value, dict):
            for key, item in value.items():
                yield from walk(item, (*path, key))
        elif not isinstance(value, list):
            yield ".".join(path), value

    read = {key: value for key, value in walk(yaml.safe_load(text)) if value is not None}
    found = canonical.scalars(text)
    assert len(found) > 80 and set(read) <= set(found)
    for key, value in read.items():
        assert (
            found[key] == (str(value).lower() if isinstance(value, bool) else str(value)) or float(found[key]) == value
        ), key
    assert found["recipe.lora.targets"] == ",".join(yaml.safe_load(text)["recipe"]["lora"]["targets"])
    assert found["tasks.families"] == ",".join(yaml.safe_load(text)["tasks"]["families"])
    assert "policy.axes" not in found  # a list of mappings


def test_the_articles_are_there_without_yaml():
    """After an amendment: json.dumps(constitution.load().articles, indent=1, sort_keys=True) into constitution/articles.json."""
    assert json.loads((constitution.HERE / "articles.json").read_text()) == facts.load_constitution().articles
