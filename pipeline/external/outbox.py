"""What is to be sent to the external target, as files: the adapter by digest, and the competition's archive of it.

    outbox/0003/     adapter/  submission.zip     built aside, there when whole
    outbox/0003.json {"number": 3, "round", "arm", "purpose", "adapter_digest", "target", "message"}     written last: ready to be sent

The archive is made by the exporter of the pristine image, where images can be mounted; a login node that sends it needs no more than
the files. They go when the score is there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.campaign import canonical
from pipeline.campaign.errors import IntegrityError, NotFound, WorkFailed
from pipeline.campaign.files import read_json, write_file
from pipeline.campaign.layout import Campaign
from pipeline.config.settings import Settings
from pipeline.decision.board_submissions import REFERENCE, Submission
from pipeline.execution import adapter, image_process
from pipeline.sandbox import image

ARCHIVE = "submission.zip"
Pack = Callable[[Path, Path], None]
"""Makes an archive (second) of an adapter's folder (first)."""


def adapter_of(campaign: Campaign, one: Submission) -> Path:
    """Folder of the adapter that was reserved: of the attempt that sealed it, checked by digest. Raises NotFound, IntegrityError."""
    folder, arm = campaign.round(one.round), one.arm
    if arm == REFERENCE:
        folder, arm = campaign.round("r0000"), "a0"
    attempts = [each for each in folder.attempts(arm) if each.sealed.exists()]
    mine = [each for each in attempts if read_json(each.sealed)["adapter_digest"] == one.adapter_digest]
    kept = next((each.adapter_dir for each in mine if (each.adapter_dir / adapter.WEIGHTS).exists()), None)
    if kept is None:
        raise NotFound(
            f"{folder.name}/{arm} has no adapter {one.adapter_digest[:16]}, which number {one.number} is",
            "Restore it from a copy",
        )
    found = adapter.kept_digest(kept)
    if found != one.adapter_digest:
        raise IntegrityError(
            f"{kept} has digest {found[:16]}, it was sealed as {one.adapter_digest[:16]}", "Restore it"
        )
    return kept


def message_of(facts: Mapping[str, Any], one: Submission) -> str:
    """The one line by which a target that keeps a list knows this submission again: campaign, number, adapter."""
    return f"{facts['campaign']} {one.number:04d} {one.adapter_digest[:12]}"


def folder_of(campaign: Campaign, number: int) -> Path:
    return Path(campaign.outbox / f"{number:04d}")


def is_ready(campaign: Campaign, number: int) -> bool:
    """Whether everything that sending needs is there."""
    return Path(campaign.outbox / f"{number:04d}.json").exists() and folder_of(campaign, number).is_dir()


def post(campaign: Campaign, facts: Mapping[str, Any], one: Submission, pack: Pack | None) -> None:
    """Put a submission into the outbox; what is there already stays. pack: makes the archive; None where nobody wants one.

    Raises NotFound or IntegrityError where the adapter is not what was reserved, TrialFailed where the exporter refuses it, WorkFailed
    where it cannot be written.
    """
    if is_ready(campaign, one.number):
        return
    kept, ready = adapter_of(campaign, one), folder_of(campaign, one.number)
    aside = None
    try:
        campaign.outbox.mkdir(exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{one.number:04d}.", dir=campaign.outbox))
        (aside / "adapter").mkdir()
        for name in (adapter.WEIGHTS, adapter.CONFIG):
            link(kept / name, aside / "adapter" / name)
        if pack:
            pack(kept, aside / ARCHIVE)
        aside.chmod(0o755)
        shutil.rmtree(ready, ignore_errors=True)  # of a start that was killed before it wrote the file beside
        os.rename(aside, ready)
    except OSError as error:
        raise WorkFailed(f"cannot fill {campaign.outbox}: {error.strerror}", "Free space or rights there") from error
    finally:
        if aside:
            shutil.rmtree(aside, ignore_errors=True)
    fields = ("number", "round", "arm", "purpose", "adapter_digest", "target")
    content = {name: getattr(one, name) for name in fields} | {"message": message_of(facts, one)}
    write_file(campaign.outbox / f"{one.number:04d}.json", canonical.encoded(content))


def link(source: Path, target: Path) -> None:
    """A second name where the file system has them, else a copy: an adapter may have a gigabyte."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def clear(campaign: Campaign, number: int) -> None:
    """Remove what was sent."""
    (campaign.outbox / f"{number:04d}.json").unlink(missing_ok=True)
    shutil.rmtree(folder_of(campaign, number), ignore_errors=True)


def packer(campaign: Campaign, facts: Mapping[str, Any], chosen: Settings) -> Pack:
    """Pack with the exporter of the campaign's image, in a sandbox. The caller has entered a private mount namespace."""

    def pack(kept: Path, archive: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="export-", dir=chosen.cluster.scratch_dir or None) as scratch:
            given = Path(shutil.copytree(kept, Path(scratch, "in", "adapter"))).parent
            with image.mounted(campaign.image, facts["image"]["tree_digest"], Path(scratch)) as mount:
                arguments = ["submission", "/in/adapter", f"/out/{ARCHIVE}"]
                log_path = Path(scratch, "export.log")
                out = image_process.start(
                    mount.root, "formats.export", arguments, {"/in": given}, Path(scratch, "work"), log_path
                )
                shutil.copyfile(out / ARCHIVE, archive)

    return pack
