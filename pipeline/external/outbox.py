"""The outbox: the files of submissions that are ready to be sent to the external target.

    outbox/0003/     adapter/  submission.zip     renamed to this name when complete
    outbox/0003.json {"number": 3, "round", "arm", "purpose", "adapter_digest", "target", "message"}     written last: ready to be sent

The exporter of the pristine image makes the archive, on a node that can mount images. A login node needs only these files to send it.
They are removed once the score is known.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.campaign import canonical
from pipeline.campaign.errors import IntegrityError, NotFound, TrialFailed, WorkFailed
from pipeline.campaign.files import copy_file, copy_tree, read_json, write_file
from pipeline.campaign.layout import Campaign
from pipeline.config.settings import Settings
from pipeline.decision.board_submissions import REFERENCE, Submission
from pipeline.execution import adapter, image_process
from pipeline.sandbox import image

ARCHIVE = "submission.zip"
Pack = Callable[[Path, Path], None]
"""A function that makes an archive from an adapter: (folder of the adapter, path of the archive)."""


def adapter_of(campaign: Campaign, submission: Submission) -> Path:
    """Return the folder of a submission's adapter, in the attempt that sealed it.

    Raises NotFound where no attempt has it, IntegrityError where its files have another digest than the sealed one.
    """
    folder, arm = campaign.round(submission.round), submission.arm
    if arm == REFERENCE:
        folder, arm = campaign.round("r0000"), "a0"
    sealed = [attempt for attempt in folder.attempts(arm) if attempt.sealed.exists()]
    same = [attempt for attempt in sealed if read_json(attempt.sealed)["adapter_digest"] == submission.adapter_digest]
    kept = next((attempt.adapter_dir for attempt in same if (attempt.adapter_dir / adapter.WEIGHTS).exists()), None)
    if kept is None:
        raise NotFound(
            f"{folder.name}/{arm} has no adapter {submission.adapter_digest[:16]}, which number {submission.number} is",
            "Restore it from a copy",
        )
    digest = adapter.kept_digest(kept)
    if digest != submission.adapter_digest:
        raise IntegrityError(
            f"{kept} has digest {digest[:16]}, but it was sealed as {submission.adapter_digest[:16]}",
            "Restore it from a copy",
        )
    return kept


def message_of(facts: Mapping[str, Any], submission: Submission) -> str:
    """Return the line that identifies a submission in a target's list: campaign, number, adapter."""
    return f"{facts['campaign']} {submission.number:04d} {submission.adapter_digest[:12]}"


def folder_of(campaign: Campaign, number: int) -> Path:
    """Return the folder of a submission's files, which need not exist."""
    folder: Path = campaign.outbox / f"{number:04d}"
    return folder


def is_ready(campaign: Campaign, number: int) -> bool:
    """Whether the outbox holds everything that sending this submission needs."""
    folder = folder_of(campaign, number)
    return folder.with_suffix(".json").exists() and folder.is_dir()


def add(campaign: Campaign, facts: Mapping[str, Any], submission: Submission, pack: Pack | None) -> None:
    """Put a submission into the outbox, unless it is there. pack: makes the archive; None where the target needs none.

    Raises NotFound or IntegrityError where the adapter is not the reserved one, TrialFailed where the exporter refuses it, WorkFailed
    where the outbox cannot be written.
    """
    number = submission.number
    if is_ready(campaign, number):
        return
    kept, ready = adapter_of(campaign, submission), folder_of(campaign, number)
    aside = None
    try:
        campaign.outbox.mkdir(exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{number:04d}.", dir=campaign.outbox))
        (aside / "adapter").mkdir()
        for name in (adapter.WEIGHTS, adapter.CONFIG):
            hard_link_or_copy(kept / name, aside / "adapter" / name)
        if pack:
            pack(kept, aside / ARCHIVE)
        aside.chmod(0o755)
        shutil.rmtree(ready, ignore_errors=True)  # left by a process that was killed before it wrote the JSON file
        os.rename(aside, ready)
    except OSError as error:
        raise WorkFailed(f"cannot fill {campaign.outbox}: {error.strerror}", "Free space or rights there") from error
    finally:
        if aside:
            shutil.rmtree(aside, ignore_errors=True)
    fields = ("number", "round", "arm", "purpose", "adapter_digest", "target")
    content = {name: getattr(submission, name) for name in fields} | {"message": message_of(facts, submission)}
    write_file(campaign.outbox / f"{number:04d}.json", canonical.encoded(content))


def hard_link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link, or a copy where the file system allows none; an adapter may have a gigabyte."""
    try:
        os.link(source, target)
    except OSError:
        copy_file(source, target)


def remove(campaign: Campaign, number: int) -> None:
    """Remove a submission's files, if there are any."""
    (campaign.outbox / f"{number:04d}.json").unlink(missing_ok=True)
    shutil.rmtree(folder_of(campaign, number), ignore_errors=True)


def packer(campaign: Campaign, facts: Mapping[str, Any], chosen: Settings) -> Pack:
    """Return a Pack that runs the exporter of the campaign's image in a sandbox. The caller has entered a private mount namespace."""

    def pack(kept: Path, archive: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="export-", dir=chosen.cluster.scratch_dir or None) as scratch:
            given = Path(scratch, "in")
            copy_tree(kept, given / "adapter")
            with image.mounted(campaign.image, facts["image"]["tree_digest"], Path(scratch)) as mount:
                arguments = ["submission", "/in/adapter", f"/out/{ARCHIVE}"]
                log_path = Path(scratch, "export.log")
                try:
                    out = image_process.start(
                        mount.root, "formats.export", arguments, {"/in": given}, Path(scratch, "work"), log_path
                    )
                except TrialFailed as error:
                    said = [
                        line for line in log_path.read_text(errors="replace").splitlines() if line.startswith("error: ")
                    ]
                    why = said[-1].removeprefix("error: ") if said else error.what
                    raise TrialFailed(error.kind, f"the exporter refuses the adapter: {why}", error.cure) from error
                shutil.copyfile(out / ARCHIVE, archive)

    return pack
