"""Test a trial's data card: a valid one is kept, and an arm whose card names a judged prompt fails."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.campaign.errors import TrialFailed
from pipeline.execution import data_card
from substrate.data.prompt_overlap import prompt_digest
from tests.support.paths import ROOT

DIGESTS = [f"{n:064x}" for n in range(3)]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="dropping to an unprivileged uid needs root")


@pytest.fixture
def known(tmp_path: Path) -> Path:
    path = tmp_path / "train_prompts.sha256"
    path.write_text("".join(f"{digest}\n" for digest in DIGESTS[:2]))
    return path


def _write(folder: Path, value: object) -> None:
    (folder / data_card.NAME).write_text(value if isinstance(value, str) else json.dumps(value))


def test_card_is_kept_made_anew_and_as_it_was(tmp_path: Path, known: Path) -> None:
    _write(tmp_path, {"schema": 1, "prompts": DIGESTS, "families": {}})
    assert (
        data_card.check_and_keep(tmp_path, tmp_path / "kept.json", known) == "3 prompts, 1 of them not from the image"
    )
    assert json.loads((tmp_path / "kept.json").read_text()) == {"schema": 1, "prompts": DIGESTS}
    assert (tmp_path / "trial_kept.json").read_bytes() == (tmp_path / data_card.NAME).read_bytes()


@pytest.mark.parametrize(
    "value",
    ["", "{", "[]", "null", {"schema": 1}, {"schema": 2, "prompts": []}, {"schema": 1, "prompts": "x"},
     {"schema": 1, "prompts": [1]}, {"schema": 1, "prompts": ["A" * 64]}, {"schema": 1, "prompts": None}, "[" * 99999,
     {"schema": 1, "prompts": {DIGESTS[0]: 1}}, {"schema": 1, "prompts": ""}, {"schema": True, "prompts": []},
     "\ufeff" + json.dumps({"schema": 1, "prompts": []}), '{"schema": 1, "prompts": [], "prompts": []}',
     '{"schema": 1, "prompts": [], "seconds": NaN}'],
)  # fmt: skip
def test_what_is_no_card_is_refused_and_not_kept(tmp_path: Path, known: Path, value: object) -> None:
    _write(tmp_path, value)
    with pytest.raises(TrialFailed, match="is not a data card") as failed:
        data_card.check_and_keep(tmp_path, tmp_path / "kept.json", known)
    assert failed.value.kind == "bad_output"
    assert not (tmp_path / "kept.json").exists()


def test_no_card_a_link_and_a_huge_one_are_refused(
    tmp_path: Path, known: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrialFailed, match="wrote no data_card.json"):
        data_card.check_and_keep(tmp_path, tmp_path / "kept.json", known)
    (tmp_path / data_card.NAME).symlink_to("/etc/passwd")
    with pytest.raises(TrialFailed, match="not a plain file"):
        data_card.check_and_keep(tmp_path, tmp_path / "kept.json", known)
    (tmp_path / data_card.NAME).unlink()
    monkeypatch.setattr(data_card, "MAX_BYTES", 10)
    _write(tmp_path, {"schema": 1, "prompts": DIGESTS})
    with pytest.raises(TrialFailed, match="longer than 10 bytes"):
        data_card.check_and_keep(tmp_path, tmp_path / "kept.json", known)


CHECKS = """
import sys
from pathlib import Path
from pipeline.execution import data_card
from pipeline.campaign.errors import TrialFailed
from pipeline.sandbox.namespace import enter_private_namespace

enter_private_namespace([sys.executable, *sys.argv])
folder = Path(sys.argv[1])
for card in sys.argv[2:]:
    try:
        data_card.refuse_overlap(folder / "image", folder / card, folder / "in", ["dev"], folder / f"work-{card}", folder / "log")
        print("clean")
    except TrialFailed as error:
        print(error.kind, error.what)
"""


@needs_root
def test_item_of_a_judged_set_is_named(tmp_path: Path) -> None:
    """Through the image's own process, in its sandbox; the planted prompt is spelled otherwise than the item's."""
    with tempfile.TemporaryDirectory(prefix="card-", dir="/tmp") as name:  # pytest's own folder is closed to others
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(ROOT / "substrate", folder / "image/substrate", ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "in").mkdir()
        rows = [(f"roman-{n:06d}", f"Write the number {n}.50 in  Roman") for n in range(5)]
        lines = (json.dumps({"item_id": item_id, "family": "roman", "prompt": prompt}) for item_id, prompt in rows)
        (folder / "in/dev.jsonl").write_text("".join(f"{line}\n" for line in lines))
        planted = prompt_digest("WRITE the number 3.5 in roman")
        for card, digests in (("one", DIGESTS), ("two", [*DIGESTS, planted])):
            (folder / card).write_text(json.dumps({"schema": 1, "prompts": digests}))
        (folder / "checks.py").write_text(CHECKS)
        command = [sys.executable, str(folder / "checks.py"), name, "one", "two"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [
        "clean",
        "contaminated the trial learned from 1 items of dev: roman-000003",
    ], done.stderr
