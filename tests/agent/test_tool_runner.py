"""Test the meter of GPU-seconds, and the refusals of tools that start no sandbox; test_attacks_tools.py has those that do."""

from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.agent import tool_runner
from pipeline.agent.tool_runner import GpuMeter, ToolRunner


def no_sandbox(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("a sandbox was started")


@pytest.fixture
def runner(tmp_path: Path) -> ToolRunner:
    return ToolRunner(no_sandbox, tmp_path, ["substrate/recipes/**"], GpuMeter(10, 2), tmp_path)


@given(st.integers(0, 10_000), st.integers(1, 64), st.lists(st.floats(0, 100), max_size=20))
def test_a_meter_never_allows_more_than_its_plan(allowed: int, devices: int, asked: list[float]) -> None:
    meter, spent = GpuMeter(allowed, devices), 0.0
    for seconds in asked:
        granted = meter.wall_limit(seconds)
        assert 0 <= granted <= seconds
        meter.charge(granted)
        spent += granted * devices
        assert meter.used == pytest.approx(spent) and meter.used <= allowed * (1 + 1e-9)
        assert meter.left == pytest.approx(max(0.0, allowed - spent), abs=1e-6)


def test_an_overspent_meter_allows_nothing() -> None:
    meter = GpuMeter(10, 4)
    meter.charge(3)
    assert (meter.used, meter.left, meter.wall_limit(5)) == (12, 0, 0)
    meter.charge(-5)  # a clock that was set back gives nothing back
    assert meter.used == 12


@pytest.mark.parametrize(
    "arguments",
    [
        {}, [], None, {"command": "x", "seconds": 0}, {"command": "x", "seconds": 2.5}, {"command": "x", "seconds": True},
        {"command": "x", "seconds": 10**9}, {"command": ""}, {"command": "a\0b"}, {"command": "\ud800"}, {"command": 3},
        {"command": "x" * 40_000}, {"command": "x", "cwd": "/"},
    ],
)  # fmt: skip
def test_bad_arguments_of_run(runner: ToolRunner, arguments: Any) -> None:
    answered = runner.call("run", arguments)
    assert answered["ok"] is False and answered["failure"] == "bad_arguments" and answered["what"]


@pytest.mark.parametrize("name", ["delete", "", "run.", "__init__", "\x1b[2J"])
def test_unknown_tools(runner: ToolRunner, name: str) -> None:
    answered = runner.call(name, {})
    assert answered["failure"] == "unknown_tool" and answered["what"].isprintable()


def test_a_used_up_budget_starts_nothing(runner: ToolRunner) -> None:
    runner.meter.charge(5)
    answered = runner.call("run", {"command": "true"})
    assert answered["failure"] == "budget_gpu_seconds" and "10 GPU-seconds" in answered["what"]


def test_a_log_is_cut_in_its_middle(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for data in (
        b"",
        b"short\n",
        b"a" * 16_000,
        b"b" * 40_000,
        b"\xff" * 10_000,
        b"\x1b" * 10**6,
        "é".encode() * 20_000,
    ):
        log.write_bytes(b"<" + data + b">")
        text, is_cut = tool_runner._log_text(log)
        assert len(text.encode()) <= tool_runner.MAX_OUTPUT_BYTES and text.startswith("<") and text.endswith(">")
        assert is_cut == ("bytes were cut here" in text) == (len(text) < len(data.decode(errors="replace")))
