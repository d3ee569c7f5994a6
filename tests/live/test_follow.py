"""Test `status --watch`: how often Slurm is asked, what a file gets, how a screen ends, and with which exit code."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.campaign.layout import Campaign, Round
from pipeline.cli import show_round
from pipeline.cluster import slurm_clients, slurm_jobs
from pipeline.cluster.slurm_jobs import Job
from pipeline.live import follow
from tests.support.campaigns import frozen_campaign, publish
from tests.support.paths import ROOT
from tests.support.running import training


@pytest.fixture
def folder(tmp_path: Path) -> Round:
    return frozen_campaign(tmp_path).round("r0001")


def test_asking_becomes_seldom_while_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [0.0], []

    def query() -> slurm_jobs.Report:
        asked.append(now[0])
        return slurm_jobs.Report({"r0001/a1": Job("4", "RUNNING")})

    monkeypatch.setattr(follow.time, "monotonic", lambda: now[0])
    asker = follow.Asker(query, shortest=2, longest=30)
    for tenth in range(2000):
        now[0] = tenth / 10
        asker.said({"r0001/a1": "4"})
    gaps = [round(b - a) for a, b in zip(asked, asked[1:], strict=False)]
    assert gaps[:5] == [2, 4, 8, 16, 30] and set(gaps[4:]) == {30}
    asker.said({"r0001/a1": "5"})  # somebody started the arm again
    assert asked[-1] == now[0]


def soon(folder: Round, act: str, after: float = 1.0) -> threading.Timer:
    """Write the file of this name in the round's folder a moment later."""
    timer = threading.Timer(after, (folder.folder / act).write_text, ["{}"])
    timer.start()
    return timer


def test_a_file_gets_a_line_for_each_change_and_the_end(folder, capsys) -> None:
    training(folder, "a1", steps=3)
    folder.submitted.write_text(json.dumps({"kind": "slurm", "array_job_ids": ["7"], "meta_job_id": "8"}))
    timer = soon(folder, "closed.json", 2.0)
    publish(folder, "a2")
    assert main(["status", str(folder.campaign.folder), "--watch"]) == 0
    timer.join()
    said = capsys.readouterr().out
    assert said.count("r0001/a1 axis") == 1 and "3/20" in said and "r0001/a2 axis      completed" in said
    assert said.endswith(f"the round is closed; next: python -m pipeline round {folder.campaign.folder}\n")
    assert "\x1b" not in said
    assert main(["status", str(folder.campaign.folder), "--watch"]) == 0  # of a round that has ended
    assert "the round is closed" in capsys.readouterr().out


def test_slurm_s_complaints_are_shown(folder, capsys, monkeypatch) -> None:
    slurm_jobs.record_submission(folder, {"r0001/a1": "7_1"}, "8", "round")
    monkeypatch.setattr(
        slurm_clients,
        "run",
        lambda *command, **_: slurm_clients.Output("", f"{command[0]} did not answer within 15 s", True),
    )
    timer = soon(folder, "closed.json", 3.0)
    assert main(["status", str(folder.campaign.folder), "--watch"]) == 0
    timer.join()
    said = capsys.readouterr().out
    assert "not all of Slurm's answer could be had: squeue did not answer within 15 s" in said
    assert "Slurm does not answer, so states come from files alone" in said


def test_a_round_that_nothing_runs_any_more_ends_the_view_with_1(folder, capsys, monkeypatch) -> None:
    monkeypatch.setattr(show_round, "OVER_SECONDS", 0.6)
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    folder.submitted.write_text(json.dumps({"kind": "local", "pid": int(ended.stdout)}))
    assert main(["status", str(folder.campaign.folder), "--watch"]) == 1
    said = capsys.readouterr().out
    assert f"no process runs it now; this resumes it: python -m pipeline round {folder.campaign.folder}" in said


def on_a_terminal(
    folder: Round, width: int, /, until: str, by: signal.Signals = signal.SIGINT, **environment: str
) -> tuple[str, int]:
    """(what was shown, exit code) of `status --watch` on a terminal, which gets a signal, by default that of Ctrl-C, once `until` was shown."""
    # A shell that runs these tests in the background has its children ignore the signal of Ctrl-C.
    command = [
        "env",
        "--default-signal=INT",
        sys.executable,
        "-m",
        "pipeline",
        "status",
        str(folder.campaign.folder),
        "--watch",
    ]
    main_end, other_end = pty.openpty()
    fcntl.ioctl(other_end, termios.TIOCSWINSZ, struct.pack("HHHH", 30, width, 0, 0))
    env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    env |= {"TERM": "xterm-256color", **environment}
    with subprocess.Popen(
        command, cwd=ROOT, stdin=other_end, stdout=other_end, stderr=other_end, env=env, start_new_session=True
    ) as watch:
        os.close(other_end)
        shown, asked = "", False
        while True:
            try:
                shown += os.read(main_end, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                break
            if until in shown and not asked:
                asked = True
                os.kill(watch.pid, by)
        code = watch.wait(30)
    os.close(main_end)
    assert asked, shown
    return shown, code


def last_screen(shown: str) -> str:
    """What stays on the terminal: the text after the last time that the view was taken away."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.rpartition("\x1b[2K")[2])


@pytest.mark.parametrize("width", [100, 60])
def test_a_screen_is_left_whole_by_ctrl_c(folder, width) -> None:
    training(folder, "a1", steps=3)
    shown, code = on_a_terminal(folder, width, until="3/20")
    screen = last_screen(shown)
    assert code == 130 and "Traceback" not in shown and "interrupted" not in shown
    assert re.search(r"a1 +running +training", screen) and "a7        waiting" in screen
    assert all(len(line) <= width for line in screen.splitlines())
    assert "\x1b[36m" in shown  # cyan, of an arm that runs
    assert shown.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_sigterm_ends_a_screen_with_its_cursor_back(folder) -> None:
    """`pause` sends one to a `round`, whose terminal somebody goes on using."""
    training(folder, "a1", steps=3)
    shown, code = on_a_terminal(folder, 100, until="3/20", by=signal.SIGTERM)
    assert code == -signal.SIGTERM and shown.rstrip().endswith("\x1b[?25h")


def test_a_screen_without_colour_says_the_same(folder) -> None:
    training(folder, "a1", steps=3)
    shown, code = on_a_terminal(folder, 100, until="3/20", NO_COLOR="1")
    assert code == 130 and not re.search(r"\x1b\[(\d+;)*3[0-7]m", shown) and "a1        running" in last_screen(shown)
    dumb, _ = on_a_terminal(folder, 100, until="3/20", TERM="dumb")
    assert "\x1b" not in dumb and "r0001/a1" in dumb


def test_many_lines_a_second_are_followed(folder, capsys) -> None:
    """A trial that writes a thousand lines a second, each in two halves."""
    attempt, stop = training(folder, "a1", steps=1), threading.Event()

    def write() -> None:
        step = 1
        with attempt.progress.open("a", buffering=1) as file:
            while not stop.is_set():
                step += 1
                text = json.dumps(
                    {
                        "phase": "train",
                        "step": step,
                        "num_steps": 10**6,
                        "loss": 1.0,
                        "tokens": step,
                        "seconds": step / 1000,
                    }
                )
                file.write(text[:40])
                file.flush()
                file.write(text[40:] + "\n")
                time.sleep(0.001)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        timer = soon(folder, "closed.json", 2.0)
        assert main(["status", str(folder.campaign.folder), "--watch"]) == 0
        timer.join()
    finally:
        stop.set()
        writer.join()
    said = capsys.readouterr().out
    assert "?" not in said.replace("?25", "") and "r0001/a1" in said


def test_json_has_what_the_screen_has(folder, capsys) -> None:
    training(Campaign(folder.campaign.folder).round("r0000"), "a0", steps=9)
    training(folder, "a1", steps=3)
    assert main(["status", str(folder.campaign.folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    arm = told["arms"][1]
    assert arm["losses"] == [3.0, 1.5, 1.0] and arm["reference_loss"] == 1.0
    assert (
        arm["left"]["of"] == "training"
        and arm["left"]["by"] == "own speed"
        and arm["left"]["seconds"] == pytest.approx(17 * 2)
    )
    assert told["state"] == "open" and told["began"].endswith("+00:00") and told["why_no_end"]
