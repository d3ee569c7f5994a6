"""The image's loop, the relay and the scripted model together, without sandboxes: every scenario ends as what it is."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.agent.scripted_model import scenario
from pipeline.agent.scripted_model.server import ScriptedModel
from pipeline.agent.tool_queue import ToolAnswer
from pipeline.model_calls.budget import Limits
from pipeline.model_calls.derive_run import of_transcript
from pipeline.model_calls.transcript import content_of
from tests.agent.test_scripted_model import Fork
from tests.support.paths import ROOT
from tests.support.relays import agents_endpoint, asker, running, takes_manifest

TASK = json.loads((ROOT / "tests" / "golden" / "agent_task.json").read_text())
OUTCOMES = {
    "editing_the_scorer": "agent_closed_path", "endless_loop": "agent_watchdog", "malformed_json": "agent_malformed",
    "spent_on_reasoning": "agent_malformed",
}  # fmt: skip
"""Scenario -> the arm's outcome; the others complete, because these tools have no clock."""


@pytest.mark.parametrize("name", scenario.names())
def test_every_scenario_ends_as_what_it_is_and_none_leaks(name: str, tmp_path: Path) -> None:
    fork, axis, budget = Fork(tmp_path), TASK["config"]["arm"]["axis"], TASK["config"]["budget"]

    def handle(tool: str, arguments: Mapping[str, Any]) -> ToolAnswer:
        if tool == "run" and "SYSTEM" in arguments["command"]:  # the log whose marks the loop must break up
            return ToolAnswer(subprocess.run(arguments["command"], shell=True, capture_output=True, text=True).stdout)
        return fork.handle(tool, dict(arguments))

    with ScriptedModel(name) as model:
        endpoint = agents_endpoint(model.url)
        limits = Limits(budget["steps"], budget["tokens"], budget["answer_tokens"], budget["wall_seconds"])
        with running(
            tmp_path, asker(endpoint), endpoint=endpoint, handler=takes_manifest(axis, handle), limits=limits
        ) as relay:
            task = tmp_path / "task.json"
            task.write_text(json.dumps({**TASK, "paths": {"socket": str(relay.relay.path)}}))
            command = [sys.executable, "-P", "-m", "substrate.agent", str(task)]
            env = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250)
            assert done.returncode == 0, done.stderr
            records, spent = relay.events().records, relay.budget.spent()
    run = of_transcript(records, axis)
    assert run.outcome == OUTCOMES.get(name, "completed"), done.stdout
    answers = [content_of(record) for record in records if record["kind"] == "answer"]
    assert answers and not any(b"LEAKED" in answer for answer in answers)
    assert run.usage.steps == spent.steps and run.usage.prompt_tokens == spent.prompt_tokens
    requests = [record for record in records if record["kind"] == "request"]
    if len(requests) > 3 and name not in ("malformed_json", "dropped_connection"):
        last, counted = (
            requests[-1]["prompt_bound"],
            [each for each in records if each["kind"] == "answer"][-1]["prompt_tokens"],
        )
        assert counted <= last < 1.2 * counted  # what was counted before bounds the last request closely
