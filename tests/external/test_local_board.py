"""Test the local board with real image and sandbox, the tiny model and a process of its own. It takes half a minute."""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from pipeline.campaign import canonical
from pipeline.campaign.facts import facts_of
from pipeline.campaign.files import read_json, read_json_lines, write_file
from pipeline.campaign.layout import Campaign
from pipeline.campaign.log import Log
from pipeline.config import model_size, settings
from pipeline.decision import board_submissions
from pipeline.decision.submission_caps import Caps
from pipeline.execution import adapter
from pipeline.external import board, board_log, local_board
from pipeline.rounds import freeze
from pipeline.rounds.init import init
from pipeline.sandbox import entries
from substrate.formats.export import submission
from substrate.tasks import FAMILIES
from tests.support.paths import ROOT

CAPS = Caps(per_day=9, per_campaign=9, held_back=2, reference=2)
DAY = "2026-11-24"


def real_rows(path: Path) -> Path:
    """Rows as the competition has them, of which about a tenth is held out."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "prompt", "answer"))
        for number in range(90):
            puzzle = FAMILIES["roman"].generate(random.Random(number), "full")
            writer.writerow((f"{number:08x}", FAMILIES["roman"].render(puzzle), FAMILIES["roman"].solve(puzzle).answer))
    return path


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """Its reference has an adapter that changes nothing, so that the board decodes with the base; half of its rows are real."""
    place = tmp_path_factory.mktemp("board")
    campaign = Campaign.at(place / "board")
    overrides = [
        "experiment=smoke", "external=local", "external.rows=6", "external.real_share=0.5", "external.temperature=50",
        f"tasks.train_csv={real_rows(place / 'train.csv')}",
    ]  # fmt: skip
    init(campaign, overrides)
    freeze.freeze(campaign, "r0001", overrides)
    attempt = campaign.round("r0000").claim_attempt("a0")
    config = settings.load(campaign.round("r0000").config).to_dict()
    lora = config["recipe"]["lora"]
    modules = model_size.peft_modules(config["model"], lora["targets"])
    shapes = model_size.adapter_shapes(config["model"], lora["rank"], lora["targets"])
    rng = np.random.default_rng(1)
    tensors = {name: (rng.normal(size=shape) * ("lora_A" in name)).astype(np.float32) for name, shape in shapes.items()}
    described = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": lora["rank"], "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"], "target_modules": modules, "base_model_name_or_path": config["model"]["name"],
    }  # fmt: skip
    write_file(attempt.adapter_dir / adapter.WEIGHTS, adapter.canonical_tensors(tensors))
    write_file(attempt.adapter_dir / adapter.CONFIG, adapter.canonical_config(described))
    digest = adapter.kept_digest(attempt.adapter_dir)
    write_file(attempt.sealed, json.dumps({"adapter_digest": digest}))
    for copy in (1, 2):
        board_log.reserve(
            campaign, "r0001", "reference", "reference", digest, DAY, caps=CAPS, target="local", copy=copy
        )
    return campaign


def ask(campaign: Campaign, number: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "board", "local", str(campaign.folder), str(number)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def first(campaign: Campaign) -> str:
    done = ask(campaign, 1)
    assert done.returncode == 0, done.stderr
    return done.stdout


def evidence(campaign: Campaign, number: int) -> Path:
    return campaign.board_dir / f"{number:04d}"


def test_it_prints_two_decimals_and_nothing_else(campaign: Campaign, first: str) -> None:
    found = read_json(evidence(campaign, 1) / "score.json")
    assert first == f"{found['score']}\n"
    assert found["score"] == local_board.printed(found["correct"], found["rows"]) and found["rows"] == 6


def test_its_rows_are_generated_and_real_and_nobody_else_may_look(campaign: Campaign, first: str) -> None:
    rows = {name: read_json_lines(campaign.board_dir / "items" / name) for name in entries.ITEM_FILES}
    ids = [row["item_id"] for row in rows["prompts.jsonl"]]
    assert ids == sorted(ids) == [row["item_id"] for row in rows["answers.jsonl"]]
    held_out = {row["item_id"]: row for row in read_json_lines(campaign.held_out_dir / "prompts.jsonl")}
    real = [row for row in rows["prompts.jsonl"] if row["item_id"].startswith("real-")]
    assert len(real) == 3 and all(held_out[row["item_id"]] == row for row in real)
    assert {row["family"] for row in rows["prompts.jsonl"]} == {"roman", "text_cipher", "unit_conversion"}
    folders = [path for path in (campaign.board_dir, *campaign.board_dir.iterdir()) if path.is_dir()]
    assert len(folders) == 3 and {oct(path.stat().st_mode & 0o777) for path in folders} == {"0o700"}


def test_a_number_has_one_score_even_when_its_evidence_was_cut_short(campaign: Campaign, first: str) -> None:
    kept = evidence(campaign, 1)
    before = (kept / "score.json").read_bytes()
    assert ask(campaign, 1).stdout == first
    (kept / "score.json").unlink()  # killed before it was written
    assert ask(campaign, 1).stdout == first
    assert (kept / "score.json").read_bytes() == before


def test_the_meta_stage_takes_the_score_and_another_number_has_noise_of_its_own(campaign: Campaign, first: str) -> None:
    chosen = settings.load(campaign.round("r0001").config)
    said = board.take_scores(campaign, facts_of(campaign), chosen, CAPS, today=DAY)
    records = Log(campaign.log).records()
    scores = [read_json(evidence(campaign, number) / "score.json")["score"] for number in (1, 2)]
    assert said == [
        f"number {number} (r0001/reference, reference) scored {score}"
        for number, score in zip((1, 2), scores, strict=True)
    ]
    assert [one.printed for one in board_submissions.submissions_in(records)] == scores
    assert board_submissions.reference_score(records) == sum(map(board_submissions.Decimal, scores)) / 2
    texts = [
        [row["completion"] for row in read_json_lines(evidence(campaign, number) / "completions.jsonl")]
        for number in (1, 2)
    ]
    # One adapter and the same items, but another draw. At this temperature two draws are never equal.
    assert texts[0] != texts[1]
    assert board.take_scores(campaign, facts_of(campaign), chosen, CAPS, today=DAY) == []


PACK = """
import sys
from pathlib import Path
from pipeline.sandbox import namespace; from pipeline.external import outbox; from pipeline.config import settings
from pipeline.campaign.facts import facts_of
from pipeline.campaign.layout import Campaign
namespace.enter_private_namespace([sys.executable, *sys.argv])
campaign = Campaign.at(sys.argv[1])
pack = outbox.packer(campaign, facts_of(campaign), settings.load(campaign.round("r0001").config))
pack(Path(sys.argv[3]), Path(sys.argv[2]))
"""


def test_an_archive_is_what_the_image_s_exporter_makes_of_an_adapter(campaign: Campaign, tmp_path: Path) -> None:
    script, archive, expected, trained = (tmp_path / name for name in ("pack.py", "a.zip", "b.zip", "trained"))
    script.write_text(PACK)
    idle = campaign.round("r0000").attempts("a0")[0].adapter_dir
    shutil.copytree(idle, trained)
    tensors = {name: tensor + np.float32(1) for name, tensor in load_file(trained / adapter.WEIGHTS).items()}
    (trained / adapter.WEIGHTS).write_bytes(adapter.canonical_tensors(tensors))

    def pack(folder: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, script, campaign.folder, archive, folder]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    done = pack(idle)  # case 8: it changes nothing, and would waste a submission
    assert done.returncode and not archive.exists()
    assert "the exporter refuses the adapter: adapter_model.safetensors changes nothing" in done.stderr
    done = pack(trained)
    assert done.returncode == 0, done.stderr
    submission(trained, expected)
    assert archive.read_bytes() == expected.read_bytes()


def test_what_is_not_reserved_or_not_the_reserved_adapter_has_no_score(campaign: Campaign, first: str) -> None:
    done = ask(campaign, 7)
    assert (done.returncode, done.stdout) == (2, "") and "nobody reserved number 7" in done.stderr
    number = board_log.reserve(campaign, "r0001", "a1", "slot", "0" * 64, DAY, caps=CAPS, target="local")
    done = ask(campaign, number)
    assert (done.returncode, done.stdout) == (2, "") and "has no adapter 000000" in done.stderr
    chosen = settings.load(campaign.round("r0001").config)
    assert "has no score" in board.take_scores(campaign, facts_of(campaign), chosen, CAPS, today=DAY)[0]
    other = board_log.reserve(campaign, "r0001", "a2", "slot", "0" * 64, DAY, caps=CAPS, target="kaggle")
    assert "is for kaggle" in ask(campaign, other).stderr


def test_evidence_of_another_submission_is_damage(campaign: Campaign, first: str) -> None:
    path = evidence(campaign, 1) / "score.json"
    before = path.read_bytes()
    try:
        path.write_bytes(canonical.encoded({**read_json(path), "adapter_digest": "f" * 64}))
        assert ask(campaign, 1).returncode == 4
    finally:
        path.write_bytes(before)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_printed_score_is_the_nearest_hundredth(counts: tuple[int, int]) -> None:
    num_correct, num_rows = counts
    text = local_board.printed(num_correct, num_rows)
    assert board_submissions.parse_score(text) == text and len(text) == 4
    error = Fraction(text) - Fraction(num_correct, num_rows)
    assert Fraction(-1, 200) < error <= Fraction(1, 200)  # halves up


def test_too_few_real_rows_are_said(campaign: Campaign) -> None:
    chosen = settings.load(campaign.round("r0001").config)
    many = replace(chosen, external=replace(chosen.external, rows=600))
    with pytest.raises(local_board.ConfigError, match="real rows are held out, the board wants 300"):
        local_board.real_rows(campaign, many, "0" * 64)
    assert os.listdir(campaign.held_out_dir)
