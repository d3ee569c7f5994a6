"""Verify base weights that lie outside the image, and copy them to a node's disk where the site asks for it.

An image may name its base weights by digest instead of holding them; a 30B model has 63 GB.

    base/weights.json in the image     {"schema": 1, "files": {"model-00001-of-00013.safetensors": {"sha256": "...", "size_bytes": 1}}}
    cluster.weights_dir                the published checkpoint at the site, anywhere that its nodes can read
    cluster.stage_dir                  node-local folder for a copy; empty: read them in weights_dir

The image's digest covers weights.json, so an arm trains on exactly these bytes or fails. Each node hashes them once. It then writes a
proof, a file in the user's own folder on the node's disk, with the size, times and inode of each verified file; a later worker trusts
the proof while `stat` still returns these. One worker of a node makes the copy: it holds a lock, hashes the bytes while it copies, and
renames the folder when it is complete. If two make it even so, because the folder is shared and has no locks, the second to rename drops its own.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import ConfigError, IntegrityError, NotFound, PipelineError, WorkFailed
from pipeline.campaign.files import file_digest, read_json, write_file
from pipeline.campaign.layout import CODE_ROOT
from pipeline.campaign.shared_path import SharedPath, patiently, take_lock
from pipeline.config import fit
from pipeline.sandbox import entries, namespace

MANIFEST = entries.OUTSIDE
PATTERNS = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 2**24  # that of the published 30B has 0.6 MB
POINTER = b"version https://git-lfs"  # what a clone without Git LFS has in place of a file
BLOCK = 2**23
READERS = min(len(os.sched_getaffinity(0)), 16)  # files hashed at once: sha256 leaves the interpreter's lock


def are_outside(model: Mapping[str, Any]) -> bool:
    """Whether the image names this model's weights instead of holding them. model: the keys of hydra_conf/model."""
    return Path(model["weights"]).name == MANIFEST


def build_manifest(weights_dir: str) -> dict[str, Any]:
    """Hash every file of a published checkpoint and return its manifest.

    Raises ConfigError where `weights_dir` is not a folder, NotFound where the folder lacks weights or tokenizer.
    """
    folder, files = _folder(weights_dir), published_files(weights_dir)
    with ThreadPoolExecutor(READERS) as pool:
        digests = pool.map(lambda name: file_digest(folder / name), files)
        named = {
            name: {"sha256": digest, "size_bytes": (folder / name).stat().st_size}
            for name, digest in zip(files, digests, strict=True)
        }
    return {"schema": 1, "files": named}


def published_files(weights_dir: str) -> list[str]:
    """Return the names of a published checkpoint's files. Raises as `build_manifest`, without reading them; a link to nothing is damaged."""
    folder = _folder(weights_dir)
    found = {path.relative_to(folder).as_posix() for pattern in PATTERNS for path in folder.glob(pattern)}
    files = sorted(found | {name for name in PATTERNS if os.path.lexists(folder / name)})  # glob leaves out a dead link
    if not any(name.endswith(".safetensors") for name in files) or "tokenizer.json" not in files:
        raise NotFound(
            f"{folder} is not a published checkpoint: it has {', '.join(files) or 'none of its files'}",
            "Name a folder with *.safetensors and tokenizer.json",
        )
    for name in sorted({*_named_shards(folder), *files}):
        path = folder / name
        if not path.is_file():
            kind = "a folder, pipe or device" if path.exists() else "a link to nothing" if path.is_symlink() else ""
            what = f"{path} is {kind}" if kind else f"{folder} lacks {name}, which its index names"
            raise NotFound(what, "Copy the published files again; `cp -rL` follows the links of a snapshot")
        with open(path, "rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise NotFound(f"{path} is a pointer of Git LFS", "Run `git lfs pull` in its repository")
    return files


def _named_shards(folder: Path) -> set[str]:
    """Return the files that the index of the shards names. Raises IntegrityError where it is no index of files of the folder itself."""
    index = folder / INDEX
    try:
        if not index.is_file():
            return set()
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"it has more than {MAX_INDEX_BYTES} bytes")
        names = set(read_json(index)["weight_map"].values())
        if odd := [name for name in names if Path(name).name != name or name in ("", "..")]:
            raise ValueError(f"it names {odd[0]!r}, which is no file of its own folder")
        return names
    except (PipelineError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{index} is no index of shards: {error}", "Copy the published file again") from None


def describe(weights_dir: str, model: Mapping[str, Any], root: Path = CODE_ROOT, out: Path | None = None) -> list[str]:
    """Check a published checkpoint against a model, and return what was found in two lines: its weights, its special tokens.

    The image's own code at `root` compares names, shapes and config.json; no weight is read. out: the folder that gets the tokenizer's
    files. Raises as `published_files`, and ConfigError with that code's sentence, whose cure names the experiments whose models fit.
    """
    published_files(weights_dir)
    known = {f"experiment={name}": other for name, other in fit.models_of_experiments().items() if are_outside(other)}
    with tempfile.TemporaryDirectory(prefix="models-") as scratch:
        question, others = Path(scratch, "model.json"), Path(scratch, "known.json")
        question.write_text(json.dumps(model))
        others.write_text(json.dumps(known))

        def ask(entry: str, *more: str) -> str:
            words = [str(weights_dir), "--model", str(question), *more]
            return entries.run_substrate(root, f"formats.{entry}", words, f"cluster.weights_dir = {weights_dir}")

        weights = ask("published_weights", "--known", str(others))
        return [weights, ask("published_tokenizer", *(["--out", str(out)] if out else []))]


def unused(weights_dir: str, model: Mapping[str, Any]) -> str:
    """Say that a model reads no weights_dir, because its weights are in the image; empty where it does, or none is named."""
    if not weights_dir or are_outside(model):
        return ""
    readers = [f"experiment={name}" for name, other in fit.models_of_experiments().items() if are_outside(other)]
    inside = f"the weights of the model {model['name']} are in the image"
    return (
        f"cluster.weights_dir = {weights_dir} is not read, because {inside}; {' and '.join(readers)} read such a folder"
    )


def verified_folder(manifest_path: Path, weights_dir: str, stage_dir: str) -> Path:
    """Return a folder whose files have the digests of the manifest: `weights_dir`, or a copy in `stage_dir` if that is not empty.

    Raises ConfigError where `weights_dir` is not a folder, NotFound for a missing file, IntegrityError for the first file that differs,
    WorkFailed where the copy does not fit or cannot be written.
    """
    manifest = read_json(manifest_path)
    source = _folder(weights_dir)
    if not stage_dir:
        _verify(source, manifest)
        return source
    target = Path(stage_dir) / _digest(manifest)[:16]
    with _alone(target) as is_alone:
        if not target.exists():
            _stage(source, target, manifest, is_alone)
        _verify(target, manifest)
    return target


def _verify(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Hash every file, unless an earlier proof is still valid. Raises NotFound or IntegrityError for the first bad file."""
    for name, entry in manifest["files"].items():
        if not (folder / name).is_file():
            raise NotFound(
                f"{folder} lacks {name}",
                f"Copy the published file again; the image names it with sha256 {entry['sha256'][:16]}",
            )
    proof = _proof_path(folder, manifest)
    stats = {name: _stat(folder / name) for name in manifest["files"]}
    if _read_proof(proof) == stats:
        return
    with ThreadPoolExecutor(READERS) as pool:
        for name, digest in zip(stats, pool.map(lambda name: file_digest(folder / name), stats), strict=True):
            if digest != manifest["files"][name]["sha256"]:
                raise IntegrityError(
                    f"{folder / name} has sha256 {digest[:16]}, but the image names {manifest['files'][name]['sha256'][:16]}",
                    "Copy the published file again, or start a campaign with these weights",
                )
    write_file(proof, json.dumps(stats), mode=0o600)


def _stage(source: Path, target: Path, manifest: Mapping[str, Any], is_alone: bool) -> None:
    """Copy and hash the files in one pass into a temporary folder, then rename it to `target`.

    is_alone: whether no other worker of this machine does so, so that what one left here that was killed can be removed.
    """
    needed = sum(entry["size_bytes"] for entry in manifest["files"].values())
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise WorkFailed(
            f"{target.parent} has {free / 1e9:.1f} GB free, but the weights have {needed / 1e9:.1f} GB",
            "Free space there, or leave cluster.stage_dir empty",
        )
    partial = f".{target.name}.partial"
    for pattern in (partial, f"{partial}.{platform.node()}.*") if is_alone else ():
        for left in target.parent.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)
    aside = target.with_name(f"{partial}.{platform.node()}.{os.getpid()}")  # another machine may share the folder
    try:
        aside.mkdir(mode=0o755)
        for name, entry in manifest["files"].items():
            (aside / name).parent.mkdir(exist_ok=True)
            digest = patiently(source / name, lambda name=name: _copy(source / name, aside / name))  # type: ignore[misc]
            if digest != entry["sha256"]:
                raise IntegrityError(
                    f"{source / name} has sha256 {digest[:16]}, but the image names {entry['sha256'][:16]}",
                    "Copy the published file again",
                )
        write_file(
            _proof_path(target, manifest),
            json.dumps({name: _stat(aside / name) for name in manifest["files"]}),
            mode=0o600,
        )
        os.rename(aside, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return  # another machine has made it meanwhile; the caller verifies it
        raise WorkFailed(
            f"cannot copy the weights to {target.parent}: {error}",
            "Free space or rights there, then start the arm again",
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _copy(source: Path, target: Path) -> str:
    """Copy a file and return the sha256 of the bytes written."""
    digest = hashlib.sha256()
    with open(source, "rb") as reader, open(target, "wb") as writer:
        while block := reader.read(BLOCK):
            digest.update(block)
            writer.write(block)
        writer.flush()
        os.fsync(writer.fileno())
    target.chmod(0o644)
    return digest.hexdigest()


@contextmanager
def _alone(target: Path) -> Iterator[bool]:
    """Let one worker of a node at a time prepare `target`. Yields False where the file system has no locks, so that others may do so too."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = open(target.with_name(f".{target.name}.lock"), "w")
    except OSError as error:
        raise WorkFailed(
            f"cannot write in {target.parent}: {error}",
            "Set cluster.stage_dir to a writable folder of the node's own disk",
        ) from error
    with file:  # the lock ends with the process that holds it
        try:
            take_lock(file, fcntl.LOCK_EX)
            is_alone = True
        except ConfigError:
            is_alone = False
        yield is_alone


def _proof_path(folder: Path, manifest: Mapping[str, Any]) -> Path:
    """Return the proof's path, in this user's private folder on the node's disk. Raises IntegrityError where others may write there."""
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]
    return namespace.private_folder() / f"weights-{_digest(manifest)[:16]}-{place}.json"


def _read_proof(proof: Path) -> Any:
    """Return the proof's content, None where it is absent or damaged."""
    with suppress(OSError, PipelineError):
        return read_json(proof)


def _stat(path: Path) -> list[int]:
    """Return what changes whenever the content does: only root can set ctime back."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _folder(weights_dir: str) -> Path:
    """Return `weights_dir` as a path. Raises ConfigError where it is empty or not a folder on this machine."""
    if not weights_dir:
        raise ConfigError(
            "this model's weights are not in the image, and cluster.weights_dir is empty",
            "Set cluster.weights_dir to the folder of the published checkpoint",
        )
    folder = SharedPath(weights_dir)
    if not folder.is_dir():
        raise ConfigError(
            f"cluster.weights_dir = {weights_dir} is not a folder here",
            "Put the published checkpoint there; every node must see it under this path",
        )
    return folder
