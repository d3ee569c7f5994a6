"""Base weights that an image names by digest instead of holding them: 63 GB that every arm of every round reads.

    base/weights.json in the image     {"schema": 1, "files": {"model-00001-of-00013.safetensors": {"sha256": "...", "size_bytes": 1}}}
    cluster.weights_dir                the published checkpoint at the site, anywhere that its nodes can read
    cluster.stage_dir                  node-local folder for a copy; empty: read where it is

The image's digest covers weights.json, so an arm trains on these bytes or not at all. They are hashed once a node: a proof in the
user's own folder of the node's disk holds what `stat` said of each file when its digest was right, and is good while that is so. A
copy is made by one worker of a node, under a lock, hashed as it is written, and renamed when it is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import ConfigError, IntegrityError, NotFound, PipelineError, WorkFailed
from pipeline.campaign.files import read_json, write_file

MANIFEST = "weights.json"
PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
BLOCK = 2**23
READERS = 4  # files hashed at once: sha256 leaves the interpreter's lock


def are_outside(model: Mapping[str, Any]) -> bool:
    """Whether the image only names this model's weights."""
    return Path(model["weights"]).name == MANIFEST


def describe(weights_dir: str) -> dict[str, Any]:
    """The manifest of a checkpoint, every file hashed. Raises ConfigError without a folder, NotFound for what it lacks."""
    folder = _folder(weights_dir)
    files = sorted({path.name for pattern in PATTERNS for path in folder.glob(pattern)})
    if not any(name.endswith(".safetensors") for name in files) or "tokenizer.json" not in files:
        raise NotFound(
            f"{folder} is no published checkpoint: it has {', '.join(files) or 'nothing of one'}",
            "*.safetensors and tokenizer.json are needed",
        )
    with ThreadPoolExecutor(READERS) as pool:
        digests = pool.map(lambda name: _sha256(folder / name), files)
        entries = {
            name: {"sha256": digest, "size_bytes": (folder / name).stat().st_size}
            for name, digest in zip(files, digests, strict=True)
        }
    return {"schema": 1, "files": entries}


def ready(manifest_path: Path, weights_dir: str, stage_dir: str) -> Path:
    """A folder with exactly the bytes that the manifest names, staged where that is asked for.

    Raises IntegrityError naming the first file that differs, NotFound, ConfigError, WorkFailed when the disk is full.
    """
    manifest = read_json(manifest_path)
    source = _folder(weights_dir)
    if not stage_dir:
        _verify(source, manifest)
        return source
    target = Path(stage_dir) / _digest(manifest)[:16]
    with _locked(target):
        if target.exists():
            _verify(target, manifest)
        else:
            _stage(source, target, manifest)
    return target


def _verify(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Hash every file, unless the proof of an earlier time still holds."""
    for name, entry in manifest["files"].items():
        if not (folder / name).is_file():
            raise NotFound(
                f"{folder} lacks {name}", f"Copy it again; the image names it with sha256 {entry['sha256'][:16]}"
            )
    proof = _proof_path(folder, manifest)
    seen = {name: _stat(folder / name) for name in manifest["files"]}
    if _proved(proof) == seen:
        return
    with ThreadPoolExecutor(READERS) as pool:
        for name, digest in zip(seen, pool.map(lambda name: _sha256(folder / name), seen), strict=True):
            if digest != manifest["files"][name]["sha256"]:
                raise IntegrityError(
                    f"{folder / name} has sha256 {digest[:16]}, the image names {manifest['files'][name]['sha256'][:16]}",
                    "Copy the published file again, or make a campaign with these weights",
                )
    write_file(proof, json.dumps(seen), mode=0o600)


def _stage(source: Path, target: Path, manifest: Mapping[str, Any]) -> None:
    """Copy and hash in one pass, into a folder aside."""
    needed = sum(entry["size_bytes"] for entry in manifest["files"].values())
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise WorkFailed(
            f"{target.parent} has {free / 1e9:.1f} GB free, the weights are {needed / 1e9:.1f} GB",
            "Free space there, or leave cluster.stage_dir empty",
        )
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # of a worker that was killed: it held the lock that is ours now
    try:
        aside.mkdir(mode=0o755)
        for name, entry in manifest["files"].items():
            digest = _copy(source / name, aside / name)
            if digest != entry["sha256"]:
                raise IntegrityError(
                    f"{source / name} has sha256 {digest[:16]}, the image names {entry['sha256'][:16]}",
                    "Copy the published file again",
                )
        write_file(
            _proof_path(target, manifest),
            json.dumps({name: _stat(aside / name) for name in manifest["files"]}),
            mode=0o600,
        )
        os.rename(aside, target)
    except OSError as error:
        raise WorkFailed(
            f"cannot stage the weights in {target.parent}: {error}", "Look at its space and rights"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _copy(source: Path, target: Path) -> str:
    """The sha256 of what was written."""
    digest = hashlib.sha256()
    with open(source, "rb") as reader, open(target, "wb") as writer:
        while block := reader.read(BLOCK):
            digest.update(block)
            writer.write(block)
        writer.flush()
        os.fsync(writer.fileno())
    target.chmod(0o644)
    return digest.hexdigest()


class _locked:
    """One worker of a node at a time for one target; the lock goes with the process that holds it."""

    def __init__(self, target: Path) -> None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(target.with_name(f".{target.name}.lock"), "w")
        except OSError as error:
            raise WorkFailed(
                f"cannot write in {target.parent}: {error}",
                "cluster.stage_dir is a writable folder of the node's own disk",
            ) from error

    def __enter__(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _proof_path(folder: Path, manifest: Mapping[str, Any]) -> Path:
    """In a folder of this user alone on the node's own disk. Raises IntegrityError when that is somebody else's."""
    own = Path(tempfile.gettempdir(), f"postrain-{os.getuid()}")
    own.mkdir(mode=0o700, exist_ok=True)
    status = own.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise IntegrityError(
            f"{own} is not this user's alone", "Remove it: proofs of verified weights in it cannot be believed"
        )
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]
    return own / f"weights-{_digest(manifest)[:16]}-{place}.json"


def _proved(proof: Path) -> Any:
    try:
        return read_json(proof)
    except (OSError, PipelineError):
        return None


def _stat(path: Path) -> list[int]:
    """What changes whenever the content does: ctime cannot be set back without root."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder(weights_dir: str) -> Path:
    if not weights_dir:
        raise ConfigError(
            "this model's weights are not in the image, and cluster.weights_dir is empty",
            "cluster.weights_dir=FOLDER of the published checkpoint",
        )
    if not Path(weights_dir).is_dir():
        raise ConfigError(
            f"cluster.weights_dir = {weights_dir} is not a folder here", "Every node must see it under this path"
        )
    return Path(weights_dir)
