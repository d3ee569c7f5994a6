"""Attacks by what a trial leaves: false results and adapters, links, caches for the judge, trees, logs, clocks.

The worker's own code reads them in the arena, as it does after a training (see test_bubblewrap.py).
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.campaign.files import read_json
from pipeline.execution import results
from pipeline.execution.adapter import CONFIG_KEYS
from pipeline.rounds import meta
from tests.attacks.host import ROOT, Arena
from tests.support.campaigns import attributes, frozen_campaign, scored

CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0,
    "target_modules": ["q_proj"], "base_model_name_or_path": "tiny",
}  # fmt: skip
HONEST = ["adapter", "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "task"]
FAKES = {
    "pickle": ("an adapter that is a pickle", "no readable header"),
    "nan": ("an adapter with NaN", "holds NaN"),
    "shape": ("an adapter of another shape", "but must be F32 of shape"),
    "traversal": ("a path for a tensor's name", "is missing"),
    "beyond": ("offsets beyond the file", "data_offsets"),
    "sparse": ("an adapter longer than its tensors (sparse)", "bytes of data"),
    "config": ("an adapter configuration with a second r, NaN", "not strict JSON"),
}


def take(arena: Arena) -> dict[str, Any]:
    return arena.ask("take")


@pytest.mark.attack("links, pipes and folders where the worker reads")
def test_plant_links_in_the_output(arena: Arena) -> None:
    assert arena.attack("tamper_with_output") == "planted"
    for name in ("progress.jsonl", "adapter/passwd", "fifo", "folder"):
        assert arena.ask("read", name)["kind"] == "bad_output", name
    assert arena.ask("read", "missing")["error"] == "NotFound"
    assert arena.ask("read", "plain")["got"] == "plain"
    arena.refusals.discard("not_found")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.attack(name)) for k, (name, _) in FAKES.items()])
def test_fake_an_adapter(arena: Arena, kind: str) -> None:
    assert set(CONFIG) == CONFIG_KEYS
    arena.attack("fake_adapter", "honest", json.dumps(CONFIG))
    assert take(arena)["kept"] == HONEST
    arena.attack("fake_adapter", kind, json.dumps(CONFIG))
    answered = take(arena)
    assert answered["kind"] == "bad_output" and FAKES[kind][1] in answered["what"]
    assert json.loads((arena.world / "kept.json").read_text()) == ["task"]
    assert not (arena.world / "out/unpickled").exists() and not os.path.exists("/tmp/unpickled")


@pytest.mark.attack("fake results, seals, claims and scores beside the adapter", "only the checked adapter leaves /out")
def test_fake_a_result(arena: Arena) -> None:
    arena.attack("fake_result", json.dumps(CONFIG))
    assert take(arena)["kept"] == HONEST


@pytest.mark.attack("poison caches and hooks for the judge", "the judge starts from the image with an empty home")
def test_poison_the_caches(arena: Arena) -> None:
    planted = arena.attack("poison", "/tmp")
    assert len(planted) == 16  # in its own home and shared memory; what lies beside the runtime was refused
    answered = arena.ask("judge")
    assert answered["fork"] == "evil\n"  # the same cache works where it was planted
    assert answered["got"] == "honest [] None False\n" and answered["out"] == []


@pytest.mark.attack(
    "poison the compiled kernels of the node", "a trial has a copy of its own, which nobody reads after it"
)
def test_poison_the_kernels(arena: Arena) -> None:
    answered = arena.ask("kernels")
    assert answered["got"]["reached"] == []
    assert answered["got"]["planted"] == ["inductor", "link-0", "link-1", "link-2", "more.so"]
    assert answered["trial"] == ["evil", "evil"]  # it did change its own copy
    assert answered["later"] == ["honest", "honest"]
    assert len(set(answered["digests"])) == 1 and answered["digests"][0]


@pytest.mark.attack("a lying clock: set it, date files, tell impossible seconds", "no decision reads a trial's time")
def test_lie_about_time(arena: Arena) -> None:
    before = time.time()
    assert arena.attack("lie_about_time") == []
    assert abs(time.time() - before) < 60
    # The state that is kept is named by its step, and dated by whoever copies it.
    kept = arena.ask("keep")
    assert {"000000", "step_999999"} <= set(kept["kept"])
    assert (arena.world / "attempt/checkpoints/000000").stat().st_mtime < before + 60


@pytest.mark.attack("folders nested deeper than any path", "the copy is refused, and all of it removed")
def test_nest_folders(arena: Arena) -> None:
    code = "import os, runpy, sys; sys.path.insert(0, '/task'); import leavings; os.makedirs('/out/checkpoints/step_000001'); "
    code += "os.chdir('/out'); leavings.deep_tree('3000')"
    assert arena.ask("plain", "python", "-c", code)["code"] == 0
    assert "nested deeper" in arena.ask("keep")["why"]
    left = arena.ask("clean", "out")["left"]
    assert all(name.startswith(("pristine-", "fork-")) for name in left)


@pytest.mark.attack("a set-uid program for others", "a folder that only the worker enters; copies lose the bit")
def test_leave_a_set_uid_program(arena: Arena) -> None:
    assert arena.attack("set_uid_program") == ["0o6755"]
    (arena.world / "out/checkpoints/step_000001").mkdir(parents=True)
    kept = arena.ask("keep")
    assert "evil" in kept["kept"] and kept["modes"] == [0]
    assert arena.ask("clean", "out")["mode"] == 0o700


@pytest.mark.attack("type into the terminal of whoever reads the log", "what is no text is shown as a mark")
def test_escape_sequences_in_the_log(arena: Arena) -> None:
    code = "print('\\033]0;evil\\007\\033[2J\\x9b31m\\rold \\u202e text', flush=True); raise SystemExit(1)"
    answered = arena.ask("train", code)
    assert answered["kind"] == "crashed" and "text" in answered["what"]
    assert answered["what"].replace("\n", "").isprintable()


def test_no_decision_reads_what_a_trial_says_of_its_time(tmp_path: Path) -> None:
    """Two rounds with equal answers, in one of which every trial lies about steps and seconds."""
    decided = []
    for told in (1.0, 1e300):
        campaign = frozen_campaign(tmp_path / str(told))
        folder = campaign.round("r0001")
        for arm in folder.frozen_plan().arms:
            rows = [{"step": 1, "loss": told, "grad_norm": 0.0, "learning_rate": 0.0, "tokens": 5, "seconds": -told}]
            items = dict.fromkeys(("dev", "fresh"), scored(38 if arm.name == "a2" else 20))
            results.write_result(folder.published(arm.name), attributes(folder.frozen_plan(), arm), items, rows, {})
            os.utime(folder.published(arm.name), (told % 2**32, told % 2**32))
        decision = meta.close(campaign, folder)
        decided.append((decision.state, decision.kept, decision.policy.standing, read_json(folder.evidence)["lifts"]))
    assert decided[0] == decided[1] and decided[0][1] == "a2"


def test_logs_are_shown_without_what_a_terminal_obeys(tmp_path: Path) -> None:
    campaign = frozen_campaign(tmp_path)
    attempt = campaign.round("r0001").claim_attempt("a1")
    attempt.trial_log.write_bytes(b"\x1b]0;evil\x07 text \xff\n")
    command = [sys.executable, "-m", "pipeline", "logs", str(campaign.folder), "a1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "\ufffd]0;evil\ufffd text \ufffd\n", done.stderr
