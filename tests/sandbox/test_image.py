"""Test real images: the digest follows from content, equal content gives equal bytes, damage is refused, mounts and forks agree."""

import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.campaign import files
from pipeline.campaign.errors import ConfigError, IntegrityError, NotFound
from pipeline.sandbox import image
from tests.attacks.host import ATTACKS, USER, WHO, command_as, environment, why_not


def make_payload(root: Path, umask: int, linked: bool = False) -> Path:
    """The same payload, however it was written: under any umask, one file as a copy or a hard link of another."""
    before = os.umask(umask)
    try:
        (root / "code/empty").mkdir(parents=True)
        (root / "code/run.sh").write_text("#!/bin/sh\n")
        (root / "code/run.sh").chmod(0o777 & ~umask)
        (root / "a name\nof two lines").write_text("")
        (root / "data").write_bytes(random.Random(0).randbytes(300_000))
        (os.link if linked else shutil.copy)(root / "data", root / "same data")
        (root / "link").symlink_to("code/run.sh")
    finally:
        os.umask(before)
    return root


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if why_not("root") and why_not("user"):
        pytest.skip(why_not("user"))
    folder = tmp_path_factory.mktemp("image")
    image.build(make_payload(folder / "payload", 0o022), folder / "image.sqsh")
    return folder / "image.sqsh"


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    for path in (built, built.with_name("image.sqsh.json")):
        shutil.copy(path, tmp_path)
    return tmp_path / "image.sqsh"


def test_digest_does_not_depend_on_umask_place_or_links(tmp_path: Path) -> None:
    first = make_payload(tmp_path / "first", 0o022)
    second = make_payload(tmp_path / "second/deeper", 0o077, linked=True)
    os.utime(second / "data", (0, 0))
    assert files.tree_digest(first) == files.tree_digest(second)


@pytest.mark.parametrize("change", ["content", "mode", "name", "target", "empty folder", "file for link"])
def test_digest_depends_on_all_that_a_process_could_see(tmp_path: Path, change: str) -> None:
    root = make_payload(tmp_path / "payload", 0o022)
    before = files.tree_digest(root)
    if change == "content":
        (root / "code/run.sh").write_text("#!/bin/sh\n#")
    elif change == "mode":
        (root / "code/run.sh").chmod(0o644)
    elif change == "name":
        (root / "data").rename(root / "Data")
    elif change == "target":
        (root / "link").unlink()
        (root / "link").symlink_to("data")
    elif change == "empty folder":
        (root / "code/empty").rmdir()
    else:
        (root / "link").unlink()
        (root / "link").write_text("code/run.sh")
    assert files.tree_digest(root) != before


names = st.text("ab.\n é", min_size=1, max_size=3).filter(lambda name: name not in (".", ".."))
trees = st.dictionaries(names, st.binary())


@settings(max_examples=30, deadline=None)
@given(trees, trees)
def test_digests_are_equal_exactly_when_trees_are(one: dict[str, bytes], other: dict[str, bytes]) -> None:
    digests = []
    for tree in (one, other):
        with tempfile.TemporaryDirectory() as folder:
            for name, content in tree.items():
                Path(folder, name).write_bytes(content)
            digests.append(files.tree_digest(Path(folder)))
    assert (digests[0] == digests[1]) == (one == other)


def test_digest_of_a_known_tree(tmp_path: Path) -> None:
    """The format is fixed: frozen campaigns name images by it."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_text("content\n")
    (tmp_path / "link").symlink_to("folder")
    content = hashlib.sha256(b"content\n").hexdigest()
    fields = ["folder", "040755", "", "folder/file", "100644", content, "link", "120000", "folder"]
    assert files.tree_digest(tmp_path) == hashlib.sha256("".join(f"{field}\0" for field in fields).encode()).hexdigest()


@pytest.mark.parametrize("kind", ["fifo", "socket"])
def test_a_payload_holds_no_special_files(tmp_path: Path, kind: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        os.mkfifo(tmp_path / "special") if kind == "fifo" else listener.bind(str(tmp_path / "special"))
        with pytest.raises(ConfigError, match="special is a device, fifo or socket"):
            files.tree_digest(tmp_path)


def test_two_builds_are_the_same_bytes(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    payload = make_payload(tmp_path / "elsewhere/payload", 0o077, linked=True)
    info = image.build(payload, tmp_path / "again.sqsh")
    assert info == image.show(built) == image.show(tmp_path / "again.sqsh")
    assert (tmp_path / "again.sqsh").read_bytes() == built.read_bytes()
    assert built.read_bytes()[8:12] == bytes(4)  # the time of packing: both may fall into one second
    assert info.num_files == 4 and info.size_bytes == built.stat().st_size
    assert {path.name for path in tmp_path.glob("*again*")} == {"again.sqsh", "again.sqsh.json"}


def test_a_sound_image_is_accepted(copied: Path, tmp_path: Path) -> None:
    assert image.verify(copied, image.show(copied).tree_digest, tmp_path) == image.show(copied)


def test_a_flipped_byte_anywhere_is_refused(copied: Path) -> None:
    info, sound = image.show(copied), copied.read_bytes()
    for position in [0, len(sound) - 1, *random.Random(1).sample(range(len(sound)), 60)]:
        damaged = bytearray(sound)
        damaged[position] ^= 1
        copied.write_bytes(damaged)
        with pytest.raises(IntegrityError) as caught:
            image.verify(copied, info.tree_digest)
        assert str(copied) in str(caught.value) and info.sqsh_sha256 in str(caught.value)


@pytest.mark.parametrize("left", [0, 1, 4096])
def test_a_truncated_image_is_refused(copied: Path, left: int) -> None:
    digest = image.show(copied).tree_digest
    os.truncate(copied, left)
    with pytest.raises(IntegrityError, match="sha256 of the file"):
        image.verify(copied, digest)


def test_a_manifest_is_not_believed(copied: Path, tmp_path: Path) -> None:
    """Another image under a manifest that claims the expected digest is found by its content."""
    honest = image.show(copied).tree_digest
    payload = make_payload(tmp_path / "payload", 0o022)
    (payload / "code/run.sh").write_text("evil")
    found = image.build(payload, copied).tree_digest
    with pytest.raises(IntegrityError, match=f"{found}, expected {honest}"):
        image.verify(copied, honest)
    manifest = copied.with_name("image.sqsh.json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "tree_digest": honest}))
    with pytest.raises(IntegrityError, match=f"tree digest is {found}, expected {honest}"):
        image.verify(copied, honest)


def test_a_manifest_must_be_there_and_readable(copied: Path) -> None:
    manifest = copied.with_name("image.sqsh.json")
    for text in ("", "[]", "{}", '{"schema": 2}', '{"schema": 1, "tree_digest": "x"}'):
        manifest.write_text(text)
        with pytest.raises(IntegrityError, match="is not an image manifest"):
            image.show(copied)
    manifest.unlink()
    with pytest.raises(NotFound, match="no image manifest"):
        image.verify(copied, "")
    with pytest.raises(NotFound, match="no image "):
        image.verify(copied.with_name("other"), "")


def test_nothing_is_mounted_outside_a_private_namespace(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="enter_private_namespace"):
        with image.mounted(copied, image.show(copied).tree_digest, tmp_path):
            pass


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not tmp_path: pytest keeps that below a folder which only its own user may enter.
    with tempfile.TemporaryDirectory(prefix="image-", dir="/tmp") as name:
        Path(name).chmod(0o777)
        yield Path(name)


@pytest.mark.parametrize("who", WHO)
def test_every_mount_and_every_fork_shows_the_same_tree(who: str, built: Path, folder: Path) -> None:
    if why_not(who):
        pytest.skip(why_not(who))
    for path in (built, built.with_name("image.sqsh.json")):
        shutil.copy(path, folder)
    before = Path("/proc/mounts").read_text()
    command = command_as(who, sys.executable, "-W", "error", str(ATTACKS / "mount_and_fork.py"), str(folder))
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    seen = json.loads(done.stdout)
    backends = image.BACKENDS if who == "root" else image.BACKENDS[1:]
    assert seen["default"] == backends[0]
    assert seen["mounts"] == dict.fromkeys(backends, image.show(built).tree_digest)
    for backend in backends:
        assert seen["forks"][f"{backend} None"] == ["overlay", True, True]
        for fork_backend in image.FORK_BACKENDS:
            assert seen["forks"][f"{backend} {fork_backend}"] == [fork_backend, True, True]
    assert seen["written"] == seen["owners"] == []
    # A change of owner may take a block of attributes, and must not copy 60 GB of weights.
    assert max(seen["copied"].values()) * 512 <= 4096
    assert "tree digest" in seen["refused"]
    assert seen["left"] == ["image.sqsh", "image.sqsh.json"]
    assert Path("/proc/mounts").read_text() == before


def test_unknown_backends_name_the_valid_ones(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "require_private_namespace", lambda: None)
    with pytest.raises(ConfigError, match="Use one of loop, squashfuse, unpack"):
        with image.mounted(copied, image.show(copied).tree_digest, tmp_path, "nfs"):
            pass
    with pytest.raises(ConfigError, match="Use one of overlay, fuse-overlayfs, copy"):
        with image.forked(image.Mount(tmp_path, "", "unpack"), tmp_path, USER, "zfs"):
            pass
