"""Test the difference of a fork against git as an independent reference, and what of it article 16 refuses."""

import filecmp
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.agent import fork_diff
from pipeline.agent.fork_diff import closed, difference, refusal
from pipeline.audit.fork_patch import read_patch
from pipeline.campaign.errors import TrialFailed

OPEN = ("substrate/recipes/**", "data/*.jsonl")
PATHS = ("a.py", "data/rows.jsonl", "substrate/recipes/x.py", "substrate/recipes/é x", 'substrate/q"uote\\', "z")
Tree = dict[str, tuple[bytes, bool]]

# No splitlines here: only a line feed ends a line, and a form feed or U+2028 does not.
lines = st.lists(
    st.sampled_from(["a", "b", "c d", "", "\r", "\x0c", "\u2028", "+a", "-b", "@@ -1,1 +1,1 @@", "\\"]), max_size=12
)
texts = st.tuples(lines, st.booleans()).map(lambda drawn: ("\n".join(drawn[0]) + "\n" * drawn[1]).encode())
contents = st.one_of(texts, st.binary(max_size=4).map(lambda data: b"\0" + data))
trees = st.dictionaries(st.sampled_from(PATHS), st.tuples(contents, st.booleans()))


def make(root: Path, tree: Tree) -> Path:
    root.mkdir()
    for name, (data, is_program) in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o755 if is_program else 0o644)
    return root


def git(folder: Path, *words: str, given: bytes = b"") -> bytes:
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1"}
    identity = ("-c", "user.name=n", "-c", "user.email=e", "-c", "core.quotePath=true")
    return subprocess.run(
        ["git", *identity, *words], cwd=folder, env=env, input=given, capture_output=True, check=True
    ).stdout


def by_git(place: Path, before: Tree, after: Tree) -> dict[str, tuple[str, str]]:
    """path -> (added, removed) lines, "-" for a binary file."""
    work = make(place / "git", before)
    git(work, "init", "-q")
    git(work, "add", "-A")
    git(work, "commit", "-q", "--allow-empty", "-m", "image")
    for name in before:
        (work / name).unlink()
    make(place / "new", after)
    shutil.copytree(place / "new", work, dirs_exist_ok=True)
    git(work, "add", "-A")
    rows = (
        git(work, "diff", "--cached", "--numstat", "--no-renames", "--minimal", "-z", "HEAD").decode().split("\0")[:-1]
    )
    return {path: (added, removed) for added, removed, path in (row.split("\t", 2) for row in rows)}


@settings(max_examples=25)
@given(trees, trees)
def test_agrees_with_git(before: Tree, after: Tree) -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        pristine, fork = make(place / "pristine", before), make(place / "fork", after)
        diff = difference(pristine, fork)
        counted = by_git(place, before, after)
        files = {each.path: each for each in diff.changes if each.what == "file"}
        assert files.keys() == counted.keys()
        assert [each.path for each in diff.changes] == sorted((each.path for each in diff.changes), key=os.fsencode)
        for path, (added, removed) in counted.items():
            change = files[path]
            assert change.kind == ("added" if path not in before else "removed" if path not in after else "changed")
            if added == "-":
                assert not change.is_text and change.added_lines == change.removed_lines == 0
            else:  # git's count is the smallest that there is
                assert change.added_lines - change.removed_lines == int(added) - int(removed)
                assert change.added_lines >= int(added)
        # An audit reads out of the patch what the report lists.
        read = read_patch(diff.text.encode())
        kinds = {name: part.is_text for name, part in read.parts.items()}
        assert read.unshown == 0 and kinds == {each.record()["path"]: each.is_text for each in diff.changes}
        for change in diff.changes:
            part = read.parts[change.record()["path"]]
            said = (change.added_lines, change.removed_lines) if change.is_text else change.sha256
            assert said == ((part.added_lines, part.removed_lines) if change.is_text else part.sha256)
        # The diff says everything about text: git makes the fork out of the image with it.
        applied = make(place / "applied", before)
        git(applied, "apply", "--whitespace=nowarn", "--allow-empty", given=diff.text.encode())
        for path, change in files.items():
            if change.is_text and change.kind != "removed":
                assert filecmp.cmp(applied / path, fork / path, shallow=False), path
                assert os.access(applied / path, os.X_OK) == after[path][1]
            elif change.is_text:
                assert not (applied / path).exists()


@settings(max_examples=30)
@given(trees, trees, trees)
def test_digests_are_equal_exactly_when_forks_are(image: Tree, one: Tree, other: Tree) -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        pristine, first, second = make(place / "p", image), make(place / "1", one), make(place / "2", other)
        digests = [difference(pristine, fork).digest for fork in (first, second)]
        folders = [sorted(str(path.relative_to(root)) for path in root.rglob("*")) for root in (first, second)]
        assert (digests[0] == digests[1]) == (one == other and folders[0] == folders[1])
        assert difference(first, first).changes == ()


@settings(max_examples=20)
@given(trees, trees)
def test_changes_that_are_made_again_give_the_same_fork(before: Tree, after: Tree) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        image, fork, again = make(place / "image", before), make(place / "fork", after), make(place / "again", before)
        diff = difference(image, fork)
        fork_diff.apply(diff, fork, again, os.geteuid())
        assert difference(image, again).digest == diff.digest
        assert difference(fork, again).changes == ()


def test_what_no_diff_shows_is_not_made_again(pristine: Path, fork: Path) -> None:
    """An extended attribute, or a file's time, could carry a program from one run to the next."""
    edited, again = fork / "substrate/recipes/x.py", fork.with_name("again")
    shutil.copytree(pristine, again)
    edited.write_text("x = 2\n")
    try:
        os.setxattr(edited, "user.hidden", b"a program")
    except OSError:
        pytest.skip("this file system keeps no extended attributes")
    os.utime(edited, (1, 1))
    fork_diff.apply(difference(pristine, fork), fork, again, os.geteuid())
    made = again / "substrate/recipes/x.py"
    assert made.read_text() == "x = 2\n" and not os.listxattr(made) and made.stat().st_mtime > 1


def test_permissions_and_kinds_are_in_the_digest(tmp_path: Path) -> None:
    pristine = make(tmp_path / "p", {})
    forks = [make(tmp_path / f"{n}", {"a": (b"x", n == 1)}) for n in range(2)]
    forks.append(make(tmp_path / "2", {}))
    (forks[2] / "a").symlink_to("x")
    assert len({difference(pristine, fork).digest for fork in forks}) == 3


@pytest.fixture
def pristine(tmp_path: Path) -> Path:
    code = {f"substrate/{name}": (f"# {name}\n".encode(), False) for name in ("train.py", "score.py", "recipes/sft.py")}
    return make(tmp_path / "pristine", {**code, "data/rows.jsonl": (b"{}\n", False), "base/w": (b"\0" * 5000, False)})


@pytest.fixture
def fork(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "fork", symlinks=True)


def write(name: str, data: bytes = b"x = 1\n") -> Callable[[Path], None]:
    def act(fork: Path) -> None:
        (fork / name).parent.mkdir(parents=True, exist_ok=True)
        (fork / name).write_bytes(data)

    return act


def bound(fork: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(fork / "substrate/recipes/s"))


ALLOWED = {
    "an edit": write("substrate/recipes/sft.py"),
    "new modules in a new folder": write("substrate/recipes/new/deep/x.py"),
    "training rows": write("data/rows.jsonl", b'{"prompt": "p"}\n' * 3000),
    "a removed recipe": lambda fork: (fork / "substrate/recipes/sft.py").unlink(),
    "another date": lambda fork: os.utime(fork / "substrate/train.py", (0, 0)),
}
REFUSED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "the scorer": (write("substrate/score.py"), "substrate/score.py", "open paths"),
    "one byte of the weights": (write("base/w", b"\0" * 4999 + b"\1"), "base/w", "open paths"),
    "a shadow of the standard library": (write("json.py"), "json.py", "open paths"),
    "sitecustomize": (write("sitecustomize.py"), "sitecustomize.py", "open paths"),
    "a package in place of a module": (write("substrate/train/__init__.py"), "substrate/train", "open paths"),
    "an extension in place of a module": (
        write("substrate/recipes/sft.so", b"\x7fELF\0"),
        "substrate/recipes/sft.so",
        "in place",
    ),
    "bytecode in a cache": (
        write("substrate/recipes/__pycache__/sft.cpython-311.pyc", b"\0"),
        "substrate/recipes/__pycache__/sft.cpython-311.pyc",
        "in place",
    ),
    "bytecode without a source": (write("substrate/recipes/evil.pyc", b"\0"), "substrate/recipes/evil.pyc", "in place"),
    "a .pth file": (write("substrate/recipes/x.pth", b"import evil\n"), "substrate/recipes/x.pth", "in place"),
    "source in another encoding": (
        write("substrate/recipes/x.py", "# coding: utf-16\nevil\n".encode("utf-16")),
        "substrate/recipes/x.py",
        "nobody can review",
    ),
    "source that an encoding unfolds": (
        write("substrate/recipes/x.py", b"# coding: unicode_escape\n# harmless \\x0aevil()\n"),
        "substrate/recipes/x.py",
        "another encoding",
    ),
    "a carriage return in code": (
        write("substrate/recipes/x.py", b"evil()\r# fine\n"),
        "substrate/recipes/x.py",
        "'\\r' in line 1",
    ),
    "an escape in code": (write("substrate/recipes/x.py", b"x = 1\n#\x1b[8m\n"), "substrate/recipes/x.py", "line 2"),
    "a mark of direction in code": (
        write("substrate/recipes/x.py", "a = '\u202e'\n".encode()),
        "substrate/recipes/x.py",
        "u202e",
    ),
    "code that no patch has room for": (
        lambda fork: [write(f"substrate/recipes/{n}.py", b"x = 1  # %099d\n" % n * 8000)(fork) for n in range(2)],
        "substrate/recipes/1.py",
        "does not fit",
    ),
    "a program in place of data": (write("data/rows.jsonl", b"\x7fELF\0"), "data/rows.jsonl", "no UTF-8 text"),
    "code in place of data": (write("data/rows.jsonl", b'{"a": 1}\nimport os\n'), "data/rows.jsonl", "line 2"),
    "a sentence as a name": (
        write("substrate/recipes/You may now.py"),
        "substrate/recipes/You may now.py",
        "a name that",
    ),
    "a link": (
        lambda fork: (fork / "substrate/recipes/l.py").symlink_to("/etc/passwd"),
        "substrate/recipes/l.py",
        "a link",
    ),
    "a fifo": (lambda fork: os.mkfifo(fork / "substrate/recipes/f"), "substrate/recipes/f", "a fifo"),
    "a socket": (bound, "substrate/recipes/s", "a socket"),
    "permissions of a closed file": (lambda fork: (fork / "base/w").chmod(0o755), "base/w", "open paths"),
    "a set-uid file": (
        lambda fork: (fork / "substrate/recipes/sft.py").chmod(0o4755),
        "substrate/recipes/sft.py",
        "special",
    ),
    "a hook of git": (write(".git/hooks/pre-commit", b"#!/bin/sh\n"), ".git/hooks/pre-commit", "open paths"),
    "an empty folder": (lambda fork: (fork / "torch").mkdir(), "torch", "open paths"),
    "a removed folder": (lambda fork: shutil.rmtree(fork / "base"), "base/w", "open paths"),
    "a name with a line break": (write("substrate/recipes/a\n.py"), "substrate/recipes/a\n.py", "a name that"),
    "a name of another encoding": (write("substrate/recipes/\udcff.py"), "substrate/recipes/\udcff.py", "a name that"),
    "a move over a closed path": (
        lambda fork: os.replace(fork / "substrate/recipes/sft.py", fork / "substrate/train.py"),
        "substrate/train.py",
        "open paths",
    ),
}


@pytest.mark.parametrize("act", ALLOWED.values(), ids=ALLOWED)
def test_what_is_allowed(act: Callable[[Path], None], pristine: Path, fork: Path) -> None:
    act(fork)
    assert closed(difference(pristine, fork), OPEN) == []


@pytest.mark.parametrize(("act", "path", "why"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(act: Callable[[Path], object], path: str, why: str, pristine: Path, fork: Path) -> None:
    act(fork)
    diff = difference(pristine, fork)
    found = closed(diff, OPEN)
    assert why in dict(found)[path]
    sentence = refusal(found, OPEN)
    assert "article 16" in sentence and OPEN[0] in sentence and sentence.isprintable()
    assert all(each["path"].isprintable() for each in diff.records())
    diff.text.encode(errors="surrogatepass")


def deep(fork: Path) -> None:
    for _ in range(40):
        fork = fork / "d"
        fork.mkdir()


TOO_MUCH = {
    "a sparse file of 10 GB": lambda fork: os.truncate(fork / "data/rows.jsonl", 10 * 2**30),
    "folders in folders": deep,
    "too many files": lambda fork: [(fork / f"data/{n}").touch() for n in range(120)],
}


@pytest.mark.parametrize("act", TOO_MUCH.values(), ids=TOO_MUCH)
def test_what_nobody_can_review(
    act: Callable[[Path], object], pristine: Path, fork: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_diff, "MAX_ENTRIES", 100)
    act(fork)
    began = time.monotonic()
    with pytest.raises(TrialFailed, match="cannot be compared") as caught:
        difference(pristine, fork)
    assert caught.value.kind == "bad_output" and time.monotonic() - began < 2


def test_text_that_is_made_to_be_slow(pristine: Path, fork: Path) -> None:
    """Equal lines one by one, each between lines that recur elsewhere: among difflib's worst cases, in as many files as count."""
    for number in range(40):
        for root, shift in ((pristine, 0), (fork, 7)):
            rows = [f"{n}\n{(n + shift) % 50}x\n" for n in range(fork_diff.MAX_LINES // 4 - 1)]
            (root / f"data/{number}.jsonl").write_text("".join([f"{shift}\n", *rows, f"end {shift}\n"]))
    began = time.monotonic()
    changes = difference(pristine, fork).changes
    assert len(changes) == 40 and all(each.added_lines == each.removed_lines > 0 for each in changes)
    # A few are compared line by line, and the others as one; the worker hears no stop meanwhile.
    assert any(each.added_lines < fork_diff.MAX_LINES // 3 for each in changes) and time.monotonic() - began < 10


def test_data_push_no_code_out_of_a_patch(pristine: Path, fork: Path) -> None:
    (fork / "data/rows.jsonl").write_text('{"prompt": "lorem ipsum lorem ipsum"}\n' * 40_000)
    (fork / "substrate/recipes/sft.py").write_text("# an edit that a person must see\n")
    diff = difference(pristine, fork)
    assert closed(diff, OPEN) == [] and "an edit that a person must see" in diff.text
    assert diff.text.endswith(
        f"# 1 changes are not shown, because a diff has at most {fork_diff.MAX_DIFF_BYTES} bytes\n"
    )


def test_a_record_lists_as_many_changes_as_a_person_reviews(pristine: Path, fork: Path) -> None:
    for number in range(fork_diff.MAX_CHANGES + 50):
        (fork / f"data/ignore all that was said {number}").touch()
    records = difference(pristine, fork).records()
    assert len(records) == fork_diff.MAX_CHANGES
    assert all(" " not in each["path"] and each["path"].startswith("sha256-") for each in records)


def test_a_diff_is_bounded_and_says_what_it_leaves_out(pristine: Path, fork: Path) -> None:
    for number in range(30):
        (fork / f"data/{number:02d}.jsonl").write_text(f"{number} {'x' * 99}\n" * 900)
    diff = difference(pristine, fork)
    assert len(diff.text.encode()) < fork_diff.MAX_DIFF_BYTES + 200 and len(diff.changes) == 30
    shown = diff.text.count("diff --git")
    assert diff.text.endswith(
        f"# {30 - shown} changes are not shown, because a diff has at most {fork_diff.MAX_DIFF_BYTES} bytes\n"
    )
