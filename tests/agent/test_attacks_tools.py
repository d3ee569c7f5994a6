"""Attacks of an agent through its tools, in the real sandbox: each ends in a typed refusal, or is found before a training.

arena.py starts each with a fresh fork, in which `substrate/open/**` is open, and compares the fork with the image afterwards.
"""

import json
import sys
import time
from typing import Any

import pytest

from tests.attacks.host import Arena

SCORER = "import substrate.train; open('/substrate/substrate/train.py', 'a').write('evil')"
TAG = sys.implementation.cache_tag


def agent(arena: Arena, *calls: Any, **more: Any) -> dict[str, Any]:
    """What the tools answered. A text is a command; else the tool's name and arguments."""
    whole = [["run", {"command": each, "seconds": 20}] if isinstance(each, str) else list(each) for each in calls]
    told = arena.ask("agent", calls=whole, **more)
    assert "error" not in told, told
    assert told["left"] == []  # no /out, log or request stays
    return told


def output(told: dict[str, Any], number: int = -1) -> str:
    answered = told["answers"][number]
    assert answered["ok"], answered
    return str(answered["output"])


def test_an_honest_agent(arena: Arena) -> None:
    told = agent(
        arena,
        ("list", {"path": "substrate"}),
        ("write", {"path": "substrate/open/new.py", "content": "x = 1\n"}),
        ("patch", {"path": "substrate/open/new.py", "old": "1", "new": "2"}),
        "cat substrate/open/new.py; python -c 'import substrate.open.new as new; print(new.x)'; echo kept > /out/x; exit 3",
        ("search", {"pattern": "x = \\d"}),
    )
    assert output(told, 3).startswith("exit code 3; it took") and output(told, 3).endswith("x = 2\n2\n")
    assert output(told) == "substrate/open/new.py:1: x = 2"
    assert told["changed"] == ["substrate/open", "substrate/open/new.py"] and told["closed"] == []
    assert 0 < told["used"] < 40


@pytest.mark.attack("an agent's path that leads out of its fork")
def test_paths_that_lead_out(arena: Arena) -> None:
    paths = (str(arena.world / "vault/seed"), "../../etc/passwd", "/proc/self/environ", "substrate/open/../train.py")
    calls = [
        (tool, {"path": path} | more) for path in paths for tool, more in (("read", {}), ("write", {"content": "x"}))
    ]
    assert {each.get("failure") for each in agent(arena, *calls)["answers"]} == {"closed_path"}


@pytest.mark.attack("an agent's links: out of the fork, to a closed file, in place of a folder")
def test_links(arena: Arena) -> None:
    told = agent(
        arena,
        "mkdir substrate/open; cd substrate/open; ln -s /etc/passwd out.py; ln -s ../train.py closed.py; ln -s /tools tools",
        *[
            ("read", {"path": f"substrate/open/{name}"})
            for name in ("out.py", "closed.py", "tools/pipeline/agent/fork_files.py")
        ],
        ("write", {"path": "substrate/open/closed.py", "content": "evil"}),
        ("patch", {"path": "substrate/open/closed.py", "old": "import", "new": "evil"}),
    )
    assert {each.get("failure") for each in told["answers"][1:]} == {"closed_path"}
    assert [why for _, why in told["closed"]] == ["is a link"] * 3


@pytest.mark.attack("an agent writes to a closed path: by a tool, by a command, by a hard link")
def test_closed_paths(arena: Arena) -> None:
    told = agent(
        arena,
        ("write", {"path": "substrate/train.py", "content": "evil"}),
        ("write", {"path": "sitecustomize.py", "content": "evil"}),
        "mkdir -p substrate/open && ln substrate/train.py substrate/open/same.py",
        ("write", {"path": "substrate/open/same.py", "content": "evil"}),
    )
    assert [each["ok"] for each in told["answers"]] == [False, False, True, True]
    assert told["closed"] == []  # the tool replaced the name, and the closed file kept its content
    told = agent(arena, f"python -c {SCORER!r} || echo evil >> substrate/train.py; echo evil > substrate/score.py")
    assert [path for path, _ in told["closed"]] == ["substrate/score.py", "substrate/train.py"]
    told = agent(
        arena, "mkdir substrate/open; ln substrate/train.py substrate/open/s.py; echo evil > substrate/open/s.py"
    )
    assert [path for path, _ in told["closed"]] == ["substrate/train.py"]


@pytest.mark.attack(
    "an agent plants modules that Python finds first", "closed by the diff; file tools import nothing of the fork"
)
def test_shadows(arena: Arena) -> None:
    names = (
        "json.py",
        "sitecustomize.py",
        "usercustomize.py",
        "pipeline.py",
        "substrate/json.py",
        "conftest.py",
        "x.pth",
        ".git/hooks/pre-commit",
    )
    plant = "; ".join(f"mkdir -p $(dirname {name}); echo \"print('evil')\" > {name}" for name in names)
    told = agent(arena, plant, ("read", {"path": "json.py"}), "python -c 'import json'")
    assert output(told, 1) == "json.py, lines 1 to 1 of 1\nprint('evil')"
    assert "evil" in output(told)  # in the trial's own sandbox they work, so that the diff must find them
    assert set(names) <= {path for path, _ in told["closed"]}


@pytest.mark.attack(
    "an agent plants bytecode that differs from its source", "closed by the diff, and without effect on a command"
)
def test_bytecode(arena: Arena) -> None:
    plant = f"""
import pathlib, py_compile
evil = pathlib.Path("/tmp/evil.py"); evil.write_text("print('evil')\\n")
unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
pathlib.Path("substrate/open").mkdir()
pathlib.Path("substrate/open/good.py").write_text("print('good')\\n")
for path in ("substrate/open/__pycache__/good.{TAG}.pyc", "substrate/open/alone.pyc"):
    py_compile.compile("/tmp/evil.py", path, invalidation_mode=unchecked)
"""
    told = agent(
        arena,
        ("write", {"path": "substrate/open/plant.py", "content": plant}),
        "cp substrate/open/plant.py /tmp && rm -r substrate/open && python /tmp/plant.py",
        "PYTHONPYCACHEPREFIX= python -m substrate.open.good",
        "python -m substrate.open.good; find / -name __pycache__ -path '*/substrate/*' 2>/dev/null",
        "python -m substrate.open.alone",
    )
    assert output(told, 2).endswith("evil\n")  # without our variable Python would run it
    assert "good\n" in output(told, 3) and "evil" not in output(told, 3)
    assert output(told, 4).endswith("evil\n")
    closed = dict(told["closed"])
    assert set(closed) == {
        "substrate/open/__pycache__",
        f"substrate/open/__pycache__/good.{TAG}.pyc",
        "substrate/open/alone.pyc",
    }


@pytest.mark.attack(
    "an agent leaves hooks in /out, HOME, /tmp and /dev/shm for its next process", "each call gets its own"
)
def test_nothing_but_the_fork_stays(arena: Arena) -> None:
    site = f"$HOME/.local/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    leave = (
        f"mkdir -p {site}; echo \"print('evil')\" > {site}/usercustomize.py; for d in /out /tmp /dev/shm; do "
        "echo evil > $d/sitecustomize.py; cp /bin/true $d/preload.so; done; export LD_PRELOAD=/out/preload.so; ls /out /dev/shm"
    )
    told = agent(arena, leave, "find /out /tmp /dev/shm -type f; echo [$LD_PRELOAD]; python -c 'print(1)'")
    assert "preload.so" in output(told, 0)
    assert output(told).partition("\n")[2] == "[]\n1\n"
    assert told["changed"] == []


@pytest.mark.attack("an agent's fork bomb", "the limit of processes, then the limit of time; nothing is left")
def test_a_fork_bomb(arena: Arena) -> None:
    began = time.monotonic()
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    told = agent(
        arena, ["run", {"command": f"python -c '{bomb}'", "seconds": 2}], ("list", {"path": "."}), "echo alive"
    )
    assert output(told, 0).startswith("killed by the limit of this command, 2 s")
    assert output(told).endswith("alive\n") and time.monotonic() - began < 60


@pytest.mark.attack(
    "an agent's command outlives its end: daemons, ignored signals", "the sandbox dies whole; seconds are charged"
)
def test_daemons(arena: Arena) -> None:
    write = "while true; do date +%N > substrate/open/x; done"
    told = agent(
        arena,
        f"mkdir substrate/open; trap '' TERM INT HUP; (trap '' TERM HUP; setsid sh -c '{write}') & sleep 0.3; echo done",
        'a=$(cat substrate/open/x); sleep 1; [ "$a" = "$(cat substrate/open/x)" ] && echo still',
    )
    assert output(told).endswith("still\n")
    told = agent(arena, "trap '' TERM INT HUP; while true; do :; done", "echo again", gpu_seconds=3.0)
    assert [each["failure"] for each in told["answers"]] == ["budget_gpu_seconds"] * 2
    assert 3.0 <= told["used"] < 30  # a busy machine is late to look, and what was used is charged


def test_a_worker_that_is_to_stop_ends_the_command(arena: Arena) -> None:
    began = time.monotonic()
    told = arena.ask("agent", calls=[["run", {"command": "trap '' TERM; sleep 60", "seconds": 60}]], stop_after=1.0)
    assert told["error"] == "Interrupted" and time.monotonic() - began < 30
    assert not [path for path in (arena.world / "scratch").iterdir() if path.name.startswith("arm-")]


@pytest.mark.attack(
    "floods of an agent's output: endless, on both streams, escape sequences", "head and tail, printable, 16 KiB"
)
def test_floods(arena: Arena) -> None:
    mib = 2**20
    told = agent(
        arena,
        "yes",
        "python -c \"import os; os.write(1, b'start' + b'\\x1b[2J' * 500000 + b'end')\"",
        f"head -c {mib} /dev/urandom; head -c {mib} /dev/zero >&2; echo; echo the end",
    )
    for answered in told["answers"]:
        assert answered["ok"] and answered["truncated"] and len(answered["output"].encode()) <= 16 * 1024
        assert answered["output"].replace("\n", "").replace("\t", "").isprintable()
        assert "bytes were cut here" in answered["output"]
    assert output(told, 1).split("\n")[1].startswith("start") and output(told, 1).endswith("end")
    assert output(told).endswith("the end\n")


@pytest.mark.attack("an agent's regular expression that explodes")
def test_a_pattern_that_explodes(arena: Arena) -> None:
    began = time.monotonic()
    told = agent(
        arena,
        ("write", {"path": "substrate/open/a.txt", "content": "a" * 80 + "c"}),
        ("search", {"pattern": "(a|aa)+b", "path": "substrate/open/a.txt"}),
    )
    assert told["answers"][1]["failure"] == "bad_arguments" and time.monotonic() - began < 20


@pytest.mark.attack("fifos, sockets and a huge sparse file in an agent's fork")
def test_special_files(arena: Arena) -> None:
    made = "import socket; socket.socket(socket.AF_UNIX).bind('substrate/open/s')"
    told = agent(
        arena,
        f'mkdir substrate/open; mkfifo substrate/open/f; python -c "{made}"; truncate -s 10G substrate/open/big || echo refused',
        ("read", {"path": "substrate/open/f"}),
        ("read", {"path": "substrate/open/s"}),
        ("search", {"pattern": "x"}),
    )
    assert "refused" in output(told, 0)
    assert [each.get("failure") for each in told["answers"][1:3]] == ["not_text"] * 2 and told["answers"][3]["ok"]
    assert dict(told["closed"]) == {"substrate/open/f": "is a fifo", "substrate/open/s": "is a socket"}
    told = agent(arena, "mkdir substrate/open; for n in $(seq 60); do truncate -s 7M substrate/open/$n; done")
    assert "above" in told["unreadable"]


@pytest.mark.attack("an agent fills the disk by many commands, or makes a tree that nobody can walk")
def test_disk_and_depth(arena: Arena) -> None:
    files = "mkdir -p substrate/open; sleep {}; for n in $(seq 250); do : > substrate/open/{}.$n; done; sleep {}"
    calls = [["run", {"command": files.format(*each), "seconds": 60}] for each in ((0, "a", 0), (4, "b", 50))]
    told = agent(
        arena, *calls, most_files=300
    )  # of which the second command could still make fifty, or a hundred to tidy up
    assert output(told, 0).startswith("exit code 0")
    assert "wrote too much" in output(told) and "files were written, and 100 are allowed" in output(told)
    deep = "import os\nfor _ in range(3000):\n    os.mkdir('d'); os.chdir('d')"
    assert "nested deeper" in agent(arena, f'python -c "{deep}"')["unreadable"]


@pytest.mark.attack("an agent reads the caller's secrets from its command", "an empty environment, and no path to them")
def test_secrets(arena: Arena) -> None:
    told = agent(
        arena,
        f"cat /proc/*/environ /proc/*/cmdline {arena.world}/vault/seed; ls {arena.world}; ls / /proc/self/fd; cat /request.json",
    )
    told = json.dumps(told)
    assert "the-secret-of-the-caller" not in told and "must not see" not in told
