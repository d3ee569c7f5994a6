"""Test that what several machines share is built aside and appears whole, however many build it at once."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.campaign.errors import ConfigError, IntegrityError
from pipeline.campaign.layout import Campaign
from pipeline.execution import base_weights
from pipeline.sandbox import image
from tests.support.paths import ROOT
from tests.support.published import published_folder

BUILD = """
import sys; from pathlib import Path
from pipeline.sandbox import image
for _ in range(4):
    print(image.build(Path(sys.argv[1]), Path(sys.argv[2])).tree_digest)
"""


def payload(folder: Path, text: str) -> Path:
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text(text * 1000)
    return folder


def builders(*arguments: tuple[Path, Path]) -> list[subprocess.Popen[str]]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return [subprocess.Popen([sys.executable, "-P", "-c", BUILD, *map(str, words)], env=env, stdout=subprocess.PIPE, text=True)
            for words in arguments]  # fmt: skip


def test_case_15_of_images_that_are_built_at_once_one_is_there_whole(tmp_path):
    """Two payloads: whose image is there does not matter, but it has its own manifest. Two equal ones: the second drops its own."""
    out = tmp_path / "shared" / "substrate.sqsh"
    out.parent.mkdir()
    one, other = payload(tmp_path / "one", "a"), payload(tmp_path / "other", "b")
    started = builders((one, out), (other, out), (one, out))
    made = {line for process in started for line in process.communicate()[0].split()}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(made) == 2 and image.verify(out, image.show(out).tree_digest).tree_digest in made
    assert sorted(path.name for path in out.parent.iterdir()) == ["substrate.sqsh", "substrate.sqsh.json"]


def test_case_15_a_builder_that_is_killed_leaves_the_image_that_was_there(tmp_path):
    out, first = tmp_path / "substrate.sqsh", payload(tmp_path / "one", "a")
    digest = image.build(first, out).tree_digest
    (killed,) = builders((payload(tmp_path / "other", "b"), out))
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".substrate.sqsh.*/substrate.sqsh")):
        assert killed.poll() is None and time.monotonic() < deadline
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert image.verify(out, digest).tree_digest == digest
    assert image.build(first, out).tree_digest == digest


def test_an_equal_image_that_is_there_is_left_as_it_is(tmp_path):
    out, folder = tmp_path / "substrate.sqsh", payload(tmp_path / "one", "a")
    image.build(folder, out)
    before = out.stat().st_ino
    image.build(folder, out)
    assert out.stat().st_ino == before
    with open(out, "r+b") as file:
        file.truncate(100)
    image.build(folder, out)
    image.verify(out, image.show(out).tree_digest)


def test_a_payload_that_changes_while_it_is_packed_makes_no_image(tmp_path, monkeypatch):
    folder, run = payload(tmp_path / "one", "a"), image.run_program

    def changing(program, *arguments):
        if program == "mksquashfs" and arguments != ("-version",):
            (folder / "0.txt").write_text("changed")
        return run(program, *arguments)

    monkeypatch.setattr(image, "run_program", changing)
    with pytest.raises(IntegrityError, match="tree digest"):
        image.build(folder, tmp_path / "substrate.sqsh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


def make_campaign(folder: Path, results, barrier) -> None:
    """`init` without what takes long: the draft has one file, and is moved when all are that far."""
    from pipeline.rounds import init

    def plan(draft, *_):
        (draft.folder / "campaign.yaml").write_text("facts")
        barrier.wait(60)

    init.freeze_facts, init.plan_first_rounds = lambda *_: {}, plan
    try:
        init.init(Campaign.at(folder), ["experiment=smoke"])
        results.put("made")
    except ConfigError as error:
        results.put(error.what)


def test_case_15_of_two_that_make_one_campaign_the_second_goes_on_with_the_first_s(tmp_path):
    fork, folder = multiprocessing.get_context("fork"), tmp_path / "demo"
    results, barrier = fork.Queue(), fork.Barrier(2)
    makers = [fork.Process(target=make_campaign, args=(folder, results, barrier)) for _ in range(2)]
    for maker in makers:
        maker.start()
    ends = sorted(results.get(timeout=120) for _ in makers)
    for maker in makers:
        maker.join()
    assert ends == sorted(["made", f"{folder} exists"])
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["demo", "demo/campaign.yaml"]


def stage(site: Path, results) -> None:
    def without_locks(*_):
        raise ConfigError("no file locks")

    base_weights.take_lock = without_locks
    copy = base_weights._copy

    def slowly(source, target):
        time.sleep(0.05)
        return copy(source, target)

    base_weights._copy = slowly
    results.put(base_weights.verified_folder(site / "weights.json", str(site / "checkpoint"), str(site / "stage")))


def test_case_15_two_copies_of_the_weights_where_there_are_no_locks(tmp_path):
    published = published_folder(tmp_path / "checkpoint")
    (tmp_path / "weights.json").write_text(json.dumps(base_weights.build_manifest(str(published))))
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    workers = [fork.Process(target=stage, args=(tmp_path, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    folders = {results.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    (folder,) = folders
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes()
        for path in published.iterdir()
        if path.name in base_weights.published_files(str(published))
    }
    assert [path.name for path in folder.parent.iterdir() if path.name != folder.name] == [f".{folder.name}.lock"]
