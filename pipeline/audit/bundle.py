"""Pack a campaign into one zip archive for somebody else, and unpack such a bundle.

A bundle has the log, plans, decisions, completions, manifests and frozen code; adapters, HDF5 files and the image only if asked for. Secrets
(vault/) are never in it. An RO-Crate description (ro-crate-metadata.json) says what each file is and gives its sha256, for archives and
for people. The audit does not trust the description: it reads the log, and the log names the files.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import ConfigError, IntegrityError, NotFound, WorkFailed
from pipeline.campaign.files import file_digest

CRATE = "ro-crate-metadata.json"
ALWAYS_INCLUDED = re.compile(
    r"campaign\.yaml|log\.jsonl(\.torn)?|hydra/round/[^/]+\.yaml|code/.*|image/[^/]+\.json"
    r"|rounds/r[0-9]{4}/(plan\.json|forecast\.json|config\.yaml|slurm_request\.json|evidence\.json|closed\.json|decisions/[^/]+|proposals/[^/]+|meta/completions/[^/]+)"
    r"|rounds/r[0-9]{4}/a[0-9]+/attempt_[0-9]+/(claim\.json|sealed\.json|data_card\.json|probe\.json|completions/[^/]+)"
)
CHOICES = {
    "adapters": re.compile(r"rounds/r[0-9]{4}/a[0-9]+/attempt_[0-9]+/adapter/[^/]+"),
    "hdf5": re.compile(r"ledger\.h5|rounds/r[0-9]{4}/([^/]+|a[0-9]+/attempt_[0-9]+/result)\.h5"),
    "image": re.compile(r"image/[^/]+\.sqsh"),
}
BROKEN = (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError, ValueError, IndexError)
"""What `zipfile` raises for damaged archives; which one depends on the byte that was changed."""
_STAMP = (2000, 1, 1, 0, 0, 0)  # a fixed time, so that the same campaign gives the same archive


def export(folder: Path, out: Path, include: Collection[str] = ()) -> list[str]:
    """Write a campaign's bundle to `out`, completely or not at all. Returns the paths in it. include: keys of CHOICES.

    Raises ConfigError if `out` is inside the campaign, WorkFailed if it cannot be written.
    """
    if out.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{out} is inside the campaign", "Give a path outside of the campaign's folder to --export")
    patterns = [ALWAYS_INCLUDED, *(CHOICES[name] for name in include)]
    paths = [path for path in sorted(tree(folder)) if any(pattern.fullmatch(path) for pattern in patterns)]
    aside = out.with_name(f".{out.name}.{platform.node()}.{os.getpid()}")
    try:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
            _add(archive, CRATE, json.dumps(crate(folder, paths), indent=1, sort_keys=True).encode(), 0o644)
            for path in paths:
                whole = folder / path
                if whole.is_dir():
                    archive.writestr(zipfile.ZipInfo(f"{path}/", _STAMP), b"")
                else:
                    _add(archive, path, whole.read_bytes(), 0o755 if whole.stat().st_mode & stat.S_IXUSR else 0o644)
        with open(aside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(aside, out)
    except OSError as error:
        raise WorkFailed(
            f"cannot write {out}: {error.strerror}", "Free space or get rights there, then run it again"
        ) from error
    finally:
        aside.unlink(missing_ok=True)
    return paths


def tree(folder: Path) -> Iterator[str]:
    """Paths of the plain files below a campaign, and of the folders of its code, which are part of its digest. No links, no vault."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or name.split("/")[0] == "vault":
            continue
        if path.is_file() or (name.startswith("code/") and path.is_dir()):
            yield name


def _add(archive: zipfile.ZipFile, path: str, content: bytes, mode: int) -> None:
    entry = zipfile.ZipInfo(path, _STAMP)
    entry.external_attr = (stat.S_IFREG | mode) << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(entry, content)


def crate(folder: Path, paths: Collection[str]) -> dict[str, Any]:
    """The RO-Crate 1.1 description: an entity for each file, with its size in bytes and its sha256."""
    files = [path for path in paths if (folder / path).is_file()]
    root = {
        "@id": "./", "@type": "Dataset", "name": f"Campaign {folder.name}",
        "description": "Sealed log and files of a post-training campaign; `python -m pipeline audit FILE` derives every decision again.",
        "license": "https://www.apache.org/licenses/LICENSE-2.0", "hasPart": [{"@id": path} for path in files],
    }  # fmt: skip
    about = {
        "@id": CRATE, "@type": "CreativeWork", "about": {"@id": "./"}, "conformsTo": {"@id": "https://w3id.org/ro/crate/1.1"},
    }  # fmt: skip
    entities = [
        {
            "@id": path,
            "@type": "File",
            "contentSize": str((folder / path).stat().st_size),
            "sha256": file_digest(folder / path),
        }
        for path in files
    ]
    return {"@context": "https://w3id.org/ro/crate/1.1/context", "@graph": [about, root, *entities]}


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """A context that gives the folder of a campaign: `path` itself, or a temporary folder with the unpacked bundle.

    Raises NotFound if there is nothing at `path`, IntegrityError for a file that is not an undamaged bundle.
    """
    if os.path.isdir(path):  # unlike pathlib's method this does not raise for a name that is too long
        yield path
        return
    if not os.path.isfile(path):
        raise NotFound(f"{path} does not exist", "Give the folder of a campaign, or a bundle that --export wrote")
    with tempfile.TemporaryDirectory(prefix="audit-") as scratch:
        try:
            with zipfile.ZipFile(path) as archive:
                unpack(archive, Path(scratch))
        except BROKEN as error:
            raise IntegrityError(
                f"{path} is not an undamaged bundle ({error})", "Copy or download the bundle again"
            ) from error
        yield Path(scratch)


def unpack(archive: zipfile.ZipFile, folder: Path) -> None:
    """Unpack plain files and folders below `folder`.

    Raises IntegrityError for a path outside of `folder`, a link, a repeated name, or more bytes than the disk has free.
    """
    entries = archive.infolist()
    size, free = sum(entry.file_size for entry in entries), shutil.disk_usage(folder).free
    if size > free:
        raise IntegrityError(
            f"the bundle would unpack to {size:,} bytes and {folder.parent} has room for {free:,}",
            "Set TMPDIR to a folder with more space; if the size is implausible, the file is not a bundle that --export wrote",
        )
    not_ours = "Do not trust the file: --export never writes such a bundle"
    if len({entry.filename for entry in entries}) != len(entries):
        raise IntegrityError("the bundle has two files of the same name", not_ours)
    for entry in entries:
        target = folder / entry.filename
        mode = entry.external_attr >> 16
        if not target.resolve().is_relative_to(folder.resolve()) or stat.S_ISLNK(mode):
            raise IntegrityError(f"the bundle has {entry.filename!r}, which is a link or lies outside of it", not_ours)
        archive.extract(entry, folder)  # checks the CRC
        if not entry.is_dir():
            target.chmod(0o755 if mode & stat.S_IXUSR else 0o644)
