"""Test the entries of an unpacked payload: running one without a sandbox, and items of a set with several seeds."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from pipeline.sandbox import entries

ENTRY = """
import json, os, sys
if sys.argv[1:] == ["fail"]:
    sys.exit("the last words")
if sys.argv[1:] == ["wait"]:
    import time
    time.sleep(60)
print(json.dumps({"environment": dict(os.environ), "folder": os.getcwd(), "arguments": sys.argv[1:], "from": __file__}))
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    package = tmp_path / "payload" / "substrate"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "shown.py").write_text(ENTRY)
    return tmp_path / "payload"


def ours(environment: dict[str, str]) -> dict[str, str]:
    return {
        name: value for name, value in environment.items() if name != "LC_CTYPE"
    }  # Python's own, where there is no locale


def test_an_entry_gets_the_payload_and_nothing_of_the_caller(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    seen = json.loads(entries.run(root, "shown", ["a", "b"]).stdout)
    assert ours(seen["environment"]) == {
        "PATH": os.defpath,
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    assert (seen["folder"], seen["arguments"]) == (os.getcwd(), ["a", "b"])
    assert seen["from"] == str(root / "substrate" / "shown.py")
    assert not list(root.rglob("__pycache__"))


def test_a_folder_to_work_in_is_its_home(root: Path, tmp_path: Path) -> None:
    seen = json.loads(entries.run(root, "shown", [], tmp_path).stdout)
    assert seen["folder"] == str(tmp_path)
    assert seen["environment"]["HOME"] == str(tmp_path) and seen["environment"]["SUBSTRATE_ROOT"] == str(root)


def test_how_it_ended_is_told(root: Path) -> None:
    done = entries.run(root, "shown", ["fail"])
    assert done.returncode == 1 and done.stderr.endswith("the last words\n")
    with pytest.raises(subprocess.TimeoutExpired):
        entries.run(root, "shown", ["wait"], most_seconds=0.5)


def test_families_of_one_seed_are_made_together() -> None:
    seeds = {"roman": "bb", "cipher": "aa", "gravity": "bb"}
    asked = list(entries.item_configs(seeds, ["roman", "cipher", "gravity"], "small", 7, 3))
    assert [(each["seed_hex"], each["families"]) for each in asked] == [
        ("aa", ["cipher"]),
        ("bb", ["roman", "gravity"]),
    ]
    assert all((each["level"], each["num_items_per_family"], each["shift"]) == ("small", 7, 3) for each in asked)


def test_items_of_several_seeds_are_joined_in_order_of_their_ids(tmp_path: Path) -> None:
    for seed, ids in (("0", ["cipher-1", "roman-2"]), ("1", ["gravity-1"])):
        (tmp_path / seed).mkdir()
        for name in entries.ITEM_FILES:
            (tmp_path / seed / name).write_text("".join(f'{{"item_id": "{each}"}}\n' for each in ids))
    joined = entries.join_items([tmp_path / "0", tmp_path / "1"])
    assert set(joined) == {"prompts.jsonl", "answers.jsonl"}
    for text in joined.values():
        assert [json.loads(line)["item_id"] for line in text.splitlines()] == ["cipher-1", "gravity-1", "roman-2"]


def test_a_task_names_its_entry() -> None:
    task = json.loads(entries.task_text("items", {"level": "small"}, {"out": "/out"}))
    assert task == {"schema": 1, "kind": "items", "config": {"level": "small"}, "paths": {"out": "/out"}}
