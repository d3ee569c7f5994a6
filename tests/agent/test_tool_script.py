"""Test the file tools in a fork of this machine's own: what they do, what they refuse, and what bounds them."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.agent import fork_files, tool_script
from pipeline.agent.fork_files import is_open
from pipeline.agent.tool_script import MAX_OUTPUT_BYTES, answer, shortened

OPEN = ["substrate/recipes/**", "substrate/data/*.py", "data/train.jsonl"]
CODE = "def loss(x):\n    return x\n\n\ndef other(x):\n    return x\n"


@pytest.fixture
def fork(tmp_path: Path) -> Path:
    root = tmp_path / "fork"
    for name, text in (
        ("substrate/recipes/sft.py", CODE),
        ("substrate/train.py", "import sft\n"),
        ("manifest.yaml", ""),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "base").mkdir()
    (root / "base/weights").write_bytes(b"\0\1" * 100)
    (tmp_path / "secret").write_text("what a trial must not see")
    return root


def ask(fork: Path, name: str, **arguments: Any) -> dict[str, Any]:
    return answer({"name": name, "arguments": arguments, "open_paths": OPEN}, str(fork))


def says(fork: Path, name: str, **arguments: Any) -> str:
    answered = ask(fork, name, **arguments)
    assert answered["ok"], answered
    assert len(answered["output"].encode()) <= MAX_OUTPUT_BYTES
    return answered["output"]


def fails(fork: Path, name: str, **arguments: Any) -> str:
    answered = ask(fork, name, **arguments)
    assert not answered["ok"] and answered["what"], answered
    return answered["failure"]


def test_globs() -> None:
    for path, is_folder, expected in (
        ("substrate/recipes/a.py", False, True),
        ("substrate/recipes/a/b/c.py", False, True),
        ("substrate/recipes", False, False),  # not even a file in its place
        ("substrate/recipes", True, True),
        ("substrate/recipes2/a.py", False, False),
        ("substrate/data/rows.py", False, True),
        ("substrate/data/deep/rows.py", False, False),
        ("substrate/data", True, True),
        ("substrate", True, True),
        ("base", True, False),
        ("data/train.jsonl", False, True),
        ("data/TRAIN.jsonl", False, False),
    ):
        assert is_open(path, OPEN, is_folder=is_folder) == expected, path
    assert (
        is_open("a/x/y/b.py", ["a/**/b.py"])
        and is_open("a/b.py", ["a/**/b.py"])
        and not is_open("a/b.pyc", ["a/**/b.py"])
    )


parts = st.lists(st.sampled_from(["a", "b", "ab", "x.py"]), min_size=1, max_size=4)


@given(parts, st.lists(st.sampled_from(["a", "*", "**", "a*", "*.py", "?"]), min_size=1, max_size=4))
def test_globs_mean_what_they_say(path: list[str], pattern: list[str]) -> None:
    """Against a regular expression that says what the parts of a glob mean."""
    text = "".join(
        ("(?:[^/]+/)*" if part == "**" else re.escape(part).replace(r"\*", "[^/]*").replace(r"\?", "[^/]") + "/")
        for part in pattern[:-1]
    )
    last = pattern[-1]
    text += ".+" if last == "**" else re.escape(last).replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    assert is_open("/".join(path), ["/".join(pattern)]) == bool(re.fullmatch(text, "/".join(path)))
    if is_open("/".join(path), ["/".join(pattern)]):  # then every folder above it may be made
        assert all(is_open("/".join(path[:n]), ["/".join(pattern)], is_folder=True) for n in range(1, len(path)))


def test_list_shows_kinds_and_sizes(fork: Path) -> None:
    os.mkfifo(fork / "base/pipe")
    (fork / "base/a\nfile 1 forged").touch()
    assert says(fork, "list", path="base").splitlines() == [
        "file            0 'a\\nfile 1 forged'",
        "fifo            0 pipe",
        "file          200 weights",
    ]
    assert fails(fork, "list", path="nowhere") == fails(fork, "list", path="manifest.yaml") == "no_such_file"


def test_read_says_which_lines(fork: Path) -> None:
    assert says(
        fork, "read", path="substrate/recipes/sft.py"
    ) == f"substrate/recipes/sft.py, lines 1 to 6 of 6\n{CODE}".rstrip("\n")
    part = ask(fork, "read", path="./substrate//recipes/sft.py", first_line=2, num_lines=1)
    assert part["output"].endswith("lines 2 to 2 of 6; read on from line 3\n    return x") and not part["truncated"]
    assert says(fork, "read", path="manifest.yaml") == "manifest.yaml, lines 1 to 0 of 0"
    assert fails(fork, "read", path="substrate/train.py", first_line=3) == "bad_arguments"
    assert fails(fork, "read", path="base/weights") == "not_text" and fails(fork, "read", path=".") == "no_such_file"


def test_read_goes_on_where_it_was_cut(fork: Path) -> None:
    rows = [f"{n:06d} {'x' * (n % 50)}" for n in range(3000)]
    (fork / "data").mkdir()
    (fork / "data/train.jsonl").write_text("\n".join(rows))
    seen: list[str] = []
    while len(seen) < len(rows):
        answered = ask(fork, "read", path="data/train.jsonl", first_line=len(seen) + 1, num_lines=5000)
        seen += answered["output"].split("\n")[1:]
        assert answered["truncated"] == (len(seen) < len(rows))
    assert seen == rows
    (fork / "data/train.jsonl").write_text("é" * 100_000)
    assert "98000 more characters" in says(fork, "read", path="data/train.jsonl")


def test_search(fork: Path) -> None:
    assert says(fork, "search", pattern=r"^def \w+\(x\)").splitlines() == [
        "substrate/recipes/sft.py:1: def loss(x):",
        "substrate/recipes/sft.py:5: def other(x):",
        "not searched: base/weights (binary, 200 bytes)",
    ]
    assert says(fork, "search", pattern="sft", path="substrate/train.py") == "substrate/train.py:1: import sft"
    assert says(fork, "search", pattern="nothing like it", path="substrate") == "no line matches"
    (fork / "substrate/many.py").write_text("hit\n" * 1000)
    assert says(fork, "search", pattern="hit", path="substrate").count("many.py:") == tool_script.MAX_HITS
    for pattern in ("(", "(?P<a>x", "a{99999999999}", "x" * 2000):
        assert fails(fork, "search", pattern=pattern) == "bad_arguments"


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|aa)+b", "(.*a){20}b", r"(?:a?){60}a{60}b", r"(a*)*\1b"])
def test_a_pattern_that_explodes_is_stopped(fork: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    monkeypatch.setattr(tool_script, "SEARCH_SECONDS", 0.3)
    (fork / "substrate/long.txt").write_text(("a" * 60 + "c") * 3)
    began = time.monotonic()
    answered = ask(fork, "search", pattern=pattern, path="substrate/long.txt")
    assert time.monotonic() - began < 3
    assert answered["failure"] == "bad_arguments" and "took longer" in answered["what"]
    assert says(fork, "search", pattern="sft", path="substrate/train.py")  # the alarm is off again


def test_write_and_patch(fork: Path) -> None:
    assert says(fork, "write", path="substrate/recipes/new/x.py", content="x = 'é'\n") == (
        "wrote substrate/recipes/new/x.py: 9 bytes, 1 lines"
    )
    assert (fork / "substrate/recipes/new/x.py").stat().st_mode & 0o777 == 0o644
    (fork / "substrate/recipes/sft.py").chmod(0o755)
    says(
        fork,
        "patch",
        path="substrate/recipes/sft.py",
        old="def other(x):\n    return x",
        new="def other(x):\n    return 2 * x",
    )
    path = fork / "substrate/recipes/sft.py"
    assert path.read_text() == CODE.replace("(x):\n    return x\n", "(x):\n    return 2 * x\n").replace("2 * ", "", 1)
    assert path.stat().st_mode & 0o777 == 0o755
    assert sorted(os.listdir(fork)) == ["base", "manifest.yaml", "substrate"]  # nothing else is left
    assert fails(fork, "patch", path="substrate/recipes/sft.py", old="return", new="y") == "many_matches"
    assert fails(fork, "patch", path="substrate/recipes/sft.py", old="retrun", new="y") == "no_match"
    assert fails(fork, "patch", path="substrate/recipes/sft.py", old="", new="y") == "bad_arguments"
    assert fails(fork, "patch", path="substrate/recipes/none.py", old="a", new="y") == "no_such_file"


CLOSED = (
    "substrate/train.py",
    "base/weights",
    "manifest.yaml",
    "sitecustomize.py",
    "substrate/data/deep/x.py",
    ".",
    "data/other.jsonl",
)


@pytest.mark.parametrize("path", CLOSED)
def test_closed_paths_are_refused_with_their_article(fork: Path, path: str) -> None:
    for name, arguments in (("write", {"content": "x"}), ("patch", {"old": "import", "new": "x"})):
        answered = ask(fork, name, path=path, **arguments)
        assert answered["failure"] == "closed_path" and "article 16" in answered["what"] and OPEN[0] in answered["what"]
    assert (fork / "substrate/train.py").read_text() == "import sft\n" and not (fork / "substrate/data").exists()


OUT = ("/etc/passwd", "../secret", "substrate/../../secret", "substrate/recipes/../train.py", "/substrate/train.py")
TOOLS: dict[str, dict[str, Any]] = {
    "list": {}, "read": {}, "search": {"pattern": "trial"}, "write": {"content": "x"}, "patch": {"old": "a", "new": "b"},
}  # fmt: skip


@pytest.mark.parametrize("name", TOOLS)
@pytest.mark.parametrize("path", OUT)
def test_paths_that_lead_out(fork: Path, path: str, name: str) -> None:
    assert fails(fork, name, path=path, **TOOLS[name]) == "closed_path"


@pytest.mark.parametrize("name", TOOLS)
@pytest.mark.parametrize(
    "target", ["../../../secret", "/etc/passwd", "../train.py", ".", "/dev/zero", "/proc/self/environ"]
)
def test_links_are_not_followed(fork: Path, target: str, name: str) -> None:
    link, below = fork / "substrate/recipes/link", "substrate/recipes/link/secret"
    link.symlink_to(target)
    assert fails(fork, name, path="substrate/recipes/link", **TOOLS[name]) == "closed_path"
    link.unlink()
    link.symlink_to(fork.parent)
    assert fails(fork, name, path=below, **TOOLS[name]) == "closed_path"
    assert (fork.parent / "secret").read_text() == "what a trial must not see"
    assert (fork / "substrate/train.py").read_text() == "import sft\n"
    assert "must not see" not in says(fork, "search", pattern="must not see", path="substrate")


def test_no_special_file_is_opened(fork: Path) -> None:
    place = fork / "substrate/recipes"
    os.mkfifo(place / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(place / "sock"))
    os.truncate(fork / "manifest.yaml", 10 * 2**30)
    began = time.monotonic()
    for name in ("fifo", "sock"):
        for tool in ("read", "write", "patch"):
            assert fails(fork, tool, path=f"substrate/recipes/{name}", **TOOLS[tool]) == "not_text"
    assert fails(fork, "read", path="manifest.yaml") == "too_large"
    told = says(fork, "search", pattern="def loss")
    assert "sft.py:1" in told and "is a fifo" in told and "10737418240 bytes" in told
    assert time.monotonic() - began < 2


def test_a_race_reads_and_writes_nothing_outside(fork: Path) -> None:
    """A thread swaps a file with a link as fast as it can; in the worker nothing runs beside a tool."""
    place, over = fork / "substrate/recipes/race", threading.Event()

    def swap() -> None:
        while not over.is_set():
            for make in (lambda path: path.write_text("inside"), lambda path: path.symlink_to(fork.parent / "secret")):
                aside = place.with_name("aside")
                make(aside)
                os.replace(aside, place)

    place.write_text("inside")
    thread = threading.Thread(target=swap)
    thread.start()
    ends = set()
    try:
        for _ in range(400):
            for name in ("read", "write", "patch"):
                answered = ask(fork, name, path="substrate/recipes/race", **TOOLS[name])
                assert "must not see" not in json.dumps(answered)
                ends.add("ok" if answered["ok"] else answered["failure"])
    finally:
        over.set()
        thread.join()
    assert {"ok", "closed_path"} <= ends <= {"ok", "closed_path", "no_such_file", "not_text", "no_match"}
    assert (fork.parent / "secret").read_text() == "what a trial must not see"


@pytest.mark.parametrize("swapped", ["substrate/recipes", "substrate/recipes/sft.py"])
def test_a_link_that_comes_after_the_check_is_not_followed(
    fork: Path, swapped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same race, hit each time: a folder or a file becomes a link between the look at it and its opening."""
    check, outside = fork_files.status, fork.parent / "outside"
    (outside / "recipes").mkdir(parents=True)
    (outside / "sft.py").write_text("what a trial must not see")

    def check_and_swap(folder: int, part: str, path: str) -> os.stat_result:
        found = check(folder, part, path)
        if path == swapped and not (fork / swapped).is_symlink():
            (fork / swapped).rename(fork / "aside")
            (fork / swapped).symlink_to(outside if swapped.endswith("recipes") else outside / "sft.py")
        return found

    for name in ("read", "write", "patch"):
        monkeypatch.setattr(fork_files, "status", check_and_swap)
        answered = ask(fork, name, path="substrate/recipes/sft.py", **TOOLS[name])
        assert "must not see" not in json.dumps(answered)
        assert (outside / "sft.py").read_text() == "what a trial must not see" and os.listdir(outside / "recipes") == []
        if answered["ok"]:  # a write replaces the name, whatever it has become
            assert name == "write" and not swapped.endswith("recipes")
        else:
            assert answered["failure"] == "no_such_file"
        if (fork / "aside").exists():
            (fork / swapped).unlink()
            (fork / "aside").rename(fork / swapped)


def test_bad_arguments(fork: Path) -> None:
    for name, arguments in (
        ("read", {}),
        ("read", {"path": 3}),
        ("read", {"path": "manifest.yaml", "first_line": 0}),
        ("read", {"path": "manifest.yaml", "first_line": True}),
        ("read", {"path": "manifest.yaml", "num_lines": 10**30}),
        ("read", {"path": "manifest.yaml", "mode": "w"}),
        ("read", {"path": "a\0b"}),
        ("read", {"path": "\ud800"}),
        ("read", {"path": "a/" * 2000}),
        ("read", {"path": "/".join("a" * 40)}),
        ("write", {"path": "substrate/recipes/x.py", "content": "\ud800"}),
    ):
        assert fails(fork, name, **arguments) == "bad_arguments", arguments
    assert fails(fork, "write", path="substrate/recipes/x.py", content="x" * (2**20 + 1)) == "too_large"
    assert fails(fork, "delete", path="manifest.yaml") == "unknown_tool"
    assert (
        answer({"name": "read", "arguments": ["manifest.yaml"], "open_paths": OPEN}, str(fork))["failure"]
        == "bad_arguments"
    )


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3),
)


@given(
    st.sampled_from(sorted(TOOLS)),
    st.dictionaries(st.sampled_from(["path", "old", "new", "content", "pattern", "first_line"]), anything),
)
def test_no_arguments_break_a_tool(name: str, arguments: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        answered = answer({"name": name, "arguments": arguments, "open_paths": OPEN}, folder)
        assert json.loads(json.dumps(answered)) == answered
        assert answered["ok"] or answered["failure"] in ("bad_arguments", "closed_path", "no_such_file", "not_text")


@given(st.text(), st.integers(200, 2000))
def test_output_is_cut_in_the_middle(text: str, most: int) -> None:
    whole = text * 50
    kept, is_cut = shortened(whole, most)
    assert len(kept.encode()) <= most and is_cut == (len(whole.encode()) > most)
    if is_cut:
        head, _, tail = kept.partition("\n[")
        assert whole.startswith(head) and whole.endswith(tail.partition("were cut here]\n")[2])
    else:
        assert kept == whole


def test_the_script_needs_the_standard_library_alone(fork: Path, tmp_path: Path) -> None:
    """As in the sandbox: two files below a folder. The fork is full of modules that shadow what they import."""
    tools = tmp_path / "tools/pipeline/agent"
    tools.mkdir(parents=True)
    for name in ("fork_files.py", "tool_script.py"):
        (tools / name).write_text(Path(fork_files.__file__).with_name(name).read_text())
    for name in ("json", "sitecustomize", "usercustomize", "re", "pipeline"):
        (fork / f"{name}.py").write_text("print('evil')\n")
    code = "import sys; before = set(sys.modules); import pipeline.agent.tool_script; print(*set(sys.modules) - before)"
    done = subprocess.run(
        [sys.executable, "-sP", "-c", code],
        cwd=fork,
        env={"PYTHONPATH": str(tmp_path / "tools")},
        capture_output=True,
        text=True,
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "pipeline" in loaded and loaded - {"pipeline"} <= sys.stdlib_module_names, done


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_what_is_in_the_way_of_a_write_is_named_with_its_cure(fork: Path, make: Any) -> None:
    make(fork / ".tool-part")
    answered = ask(fork, "write", path="substrate/recipes/sft.py", content="x = 1\n")
    assert answered["failure"] == "closed_path" and "rm -r /substrate/.tool-part" in answered["what"]
    assert (fork / "substrate/recipes/sft.py").read_text() == CODE
