"""Skip tests that this machine cannot run, and report at the end whether the Slurm tests ran.

A test that is marked `slurm`, `gpu` or `browser`, or uses the `testbed` fixture, is skipped if the machine lacks that part, and pytest prints why.
With REQUIRE_SLURM=1, as in CI, a session fails if no Slurm test ran.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from slurm.testbed.testbed import why_not
from tests.attacks import table
from tests.attacks.fixtures import arena, folder, outsider  # noqa: F401  fixtures of tests that attack
from tests.support import browser, compositions
from tests.support.trainings import alone, inputs  # noqa: F401  fixtures of tests that train

hypothesis.settings.register_profile("shared_machine", deadline=None, max_examples=50)  # which is slow at times
hypothesis.settings.load_profile("shared_machine")

SLURM_RAN = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SLURM_RAN] = 0
    compositions.keep()


@pytest.hookimpl(tryfirst=True)  # before pytest itself selects by `-m`
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        table.announce(item)
        if "testbed" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slurm)
    no_gpu = "" if any(Path("/dev").glob("nvidia[0-9]*")) else "no NVIDIA GPU on this machine"
    absent = {"slurm": why_not(), "gpu": no_gpu, "browser": browser.why_not()}
    for item in items:
        for marker, reason in absent.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    if hasattr(
        config, "workerinput"
    ):  # of several processes none should begin a long file when the others have nothing left
        long = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in long)
    items.sort(key=lambda item: item.get_closest_marker("slurm") is not None)  # the fast ones first


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    if item.get_closest_marker("slurm"):
        item.config.stash[SLURM_RAN] += 1
    yield from table.watch(item)


def _slurm_is_missed(config: pytest.Config) -> bool:
    return os.environ.get("REQUIRE_SLURM") == "1" and config.stash[SLURM_RAN] == 0


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _slurm_is_missed(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.write_line(f"slurm tests run: {config.stash[SLURM_RAN]}")
    drilled = [
        value
        for each in terminalreporter.getreports("passed")
        for name, value in each.user_properties
        if name == "drill"
    ]
    for row in drilled:
        terminalreporter.write_line(f"| {row} |")
    reports = [each for outcome in ("passed", "failed", "skipped") for each in terminalreporter.getreports(outcome)]
    for line in table.rows(reports):
        terminalreporter.write_line(line)
    if _slurm_is_missed(config):
        terminalreporter.write_line("FAILED: REQUIRE_SLURM=1, and no Slurm test ran", red=True)
