"""The kernels of an image, compiled and tuned once for a node: a store that only pristine processes fill.

A first pass on a GPU costs one to two minutes, in which Triton tunes and torch compiles. Each later process of the same image,
GPU and runtime would do the same again. So the first worker of a node has a process of the pristine image do it, and keeps what
that leaves on the node's disk:

    <scratch>/postrain-1000/kernels/      nobody else may enter the folder, and no sandbox ever has a bind of it
      3f2a9c...-nvidia-h200-5b1e.../      image, GPU, and digest of what else matters; complete if it exists
        tree/                             what the libraries wrote
        cache.json                        digest of the tree, names of the kernels, seconds that it took
      .3f2a9c...lock                      held by the worker that fills it

These files are code that a later pristine process executes (torch even unpickles some), so a trial must not be able to change
them. Libraries want to write to their caches, also when they find everything there. Each sandbox therefore gets a copy of its
own, which is thrown away with it, and nothing is ever copied back. A copy whose digest is not the recorded one is not used: the
damaged cache is set aside and made anew.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.campaign.errors import ConfigError, IntegrityError, Interrupted, PipelineError, WorkFailed
from pipeline.campaign.files import read_json, tree_digest, walk, write_file
from pipeline.campaign.shared_path import take_lock
from pipeline.sandbox.namespace import private_folder, private_path, remove_tree

STORE = "kernels"
WAIT_SECONDS = 900.0  # for another worker of this node that fills the cache
PROGRESS_SECONDS = 30.0  # between two lines that say so
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Kernels:
    """A worker's verified copy of a cache. digest: of the tree, "" where there is none; said: what a result file says of it."""

    folder: Path | None
    digest: str
    said: str

    def private_copy(self, folder: Path, owner: int) -> Path:
        """Make `folder` with a copy for one sandbox, in which the uid `owner` may write. It is empty where there is no cache, or no space."""
        try:
            if self.folder:
                shutil.copytree(self.folder, folder, symlinks=True)
        except (OSError, shutil.Error) as error:
            without(f"it cannot be copied: {error}"[:300])
            remove_tree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if owner != os.geteuid():
            for path in (folder, *(folder / name for name in walk(folder))):
                os.chown(path, owner, owner, follow_symlinks=False)
        return folder


def store_of(scratch_dir: str | None) -> Path:
    """The folder of all caches of this user on this node, which may be absent. Raises as `namespace.private_path`."""
    return private_path(scratch_dir) / STORE


def obtain(
    scratch_dir: str | None,
    key: str,
    target: Path,
    fill: Callable[[], tuple[Path, Mapping[str, Any]]] | None,
    watch: Callable[[], None] = lambda: None,
    wait_seconds: float = WAIT_SECONDS,
) -> Kernels:
    """Copy the cache named `key` to the absent folder `target`, once it is complete; fill it if nobody does.

    scratch_dir: on whose disk it lies, as for `namespace.scratch_place`.
    fill: has a pristine process compile and tune; returns the folder that it wrote, and facts for the record; None does not fill.
    watch: called while waiting; what it raises ends the waiting. Where the cache cannot be had (another worker takes longer than
    `wait_seconds`, `fill` fails, the disk is full), one line on stderr says so and the work goes on without.
    """
    try:
        store = private_folder(scratch_dir) / STORE
        store.mkdir(mode=0o700, exist_ok=True)
        if found := _copied(store / key, target):
            return found
        if fill is None:
            return without(f"no arm has filled {key} on this node")
        with _turn(store, key, watch, wait_seconds) as is_alone:
            # Another worker may have filled it while this one waited.
            if found := _copied(store / key, target):
                return found
            if is_alone is None:
                return without(f"another worker of this node fills it, for more than {wait_seconds:.0f} s")
            began = time.monotonic()
            print(f"kernels: compiling and tuning for {key}, once on this node", file=sys.stderr, flush=True)
            made, facts = fill()
            _keep(store, key, made, {**facts, "seconds": round(time.monotonic() - began, 1)}, is_alone)
        found = _copied(store / key, target)
        return found or without("the cache was damaged as soon as it was made")
    except Interrupted:
        raise
    except (WorkFailed, IntegrityError) as error:
        return without(error.what)
    except OSError as error:
        return without(f"it cannot be written: {error}")


def garbage(store: Path, image_digest: str, is_over: bool) -> Iterator[Path]:
    """Folders of this node's store that no later run needs: damaged and unfinished caches of an image, and where its campaign is over all of them."""
    for path in sorted(store.glob(f"*{image_digest[:16]}-*")) if store.is_dir() else ():
        name = path.name.removeprefix(".")
        if path.is_dir() and (is_over or path.name != name) and not _is_being_filled(store, name):
            yield path


def slug(text: str) -> str:
    """A name of a GPU or CPU as a part of a folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "unknown"


def _copied(cache: Path, target: Path) -> Kernels | None:
    """Copy a complete cache and compare the copy's digest. A damaged cache is set aside; returns None without a good one.

    Raises WorkFailed where the cache is whole and no copy of it can be made.
    """
    if not cache.exists():
        return None
    try:
        record = read_json(cache / "cache.json")
        shutil.copytree(cache / "tree", target, symlinks=True)
        digest = tree_digest(target)
        if digest == record["digest"]:
            return Kernels(target, digest, f"{digest[:16]} ({record['kernels']}), made in {record['seconds']:g} s")
        why = f"its digest is {digest[:16]}, and {record['digest'][:16]} was recorded"
    except (OSError, PipelineError, KeyError, TypeError, ValueError) as error:
        # What copytree raises lists every file that failed with both of its paths; the first one's cause is what matters.
        is_list = isinstance(error, shutil.Error) and isinstance(error.args[0], list)
        why = f"it cannot be read: {error.args[0][0][2] if is_list else error}"
    remove_tree(target)
    if not cache.exists():
        return None  # another worker has set it aside meanwhile
    if _is_whole(cache):  # the fault is at the target, such as a full disk
        raise WorkFailed(f"a copy of {cache} cannot be made: {why}")
    aside = cache.with_name(f".{cache.name}.damaged.{platform.node()}.{os.getpid()}")
    remove_tree(aside)
    with suppress(FileNotFoundError):
        os.rename(cache, aside)
        print(f"kernels: {cache} is damaged and set aside, {why}", file=sys.stderr, flush=True)
    return None


def _is_whole(cache: Path) -> bool:
    """Whether a cache has the digest that was recorded when it was made."""
    try:
        return bool(tree_digest(cache / "tree") == read_json(cache / "cache.json")["digest"])
    except (OSError, PipelineError, KeyError, TypeError, ValueError):
        return False


def _keep(store: Path, key: str, made: Path, facts: Mapping[str, Any], is_alone: bool) -> None:
    """Write the cache aside and rename it to its place when it is whole on disk. Another machine's, which came first, stays."""
    if is_alone:
        for left in store.glob(f".{key}.partial.{platform.node()}.*"):  # of workers that were killed
            remove_tree(left)
    aside = store / f".{key}.partial.{platform.node()}.{os.getpid()}"
    try:
        shutil.copytree(made, aside / "tree", symlinks=True)
        record = {"schema": 1, "digest": tree_digest(aside / "tree"), **facts}
        write_file(aside / "cache.json", json.dumps(record, indent=1))
        os.rename(aside, store / key)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    finally:
        remove_tree(aside)


@contextmanager
def _turn(store: Path, key: str, watch: Callable[[], None], wait_seconds: float) -> Iterator[bool | None]:
    """Wait for this worker's turn to fill a cache. Yields True with the lock, False where there are no locks, None after `wait_seconds`.

    It also yields None, earlier, when the cache is complete.
    """
    began = said = time.monotonic()
    with open(store / f".{key}.lock", "w") as file:  # the lock ends with the process that holds it
        while (is_alone := _locked(file)) is None:
            waited = time.monotonic() - began
            if waited >= wait_seconds or (store / key).exists():
                break
            watch()
            if said == began or time.monotonic() - said >= PROGRESS_SECONDS:
                said = time.monotonic()
                print(f"kernels: another worker fills {key}; waiting, {waited:.0f} of at most {wait_seconds:.0f} s",
                      file=sys.stderr, flush=True)  # fmt: skip
            time.sleep(POLL_SECONDS)
        yield is_alone


def _locked(file: IO[Any]) -> bool | None:
    """Try to lock an open file. Returns whether it is locked now, None where somebody else holds it; False where there are no locks."""
    try:
        take_lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return None
    except ConfigError:
        return False


def _is_being_filled(store: Path, name: str) -> bool:
    """Whether a worker holds the lock of the cache to which a folder belongs."""
    try:
        with open(store / f".{re.sub(r'[.](partial|damaged)[.].*', '', name)}.lock") as file:
            return _locked(file) is None
    except FileNotFoundError:
        return False


def without(why: str) -> Kernels:
    """Say on stderr that there is no cache, so that each process compiles for itself, and why."""
    what = " ".join(why.split())
    print(f"kernels: going on without a cache, because {what}", file=sys.stderr, flush=True)
    return Kernels(None, "", f"no cache: {what}"[:300])
