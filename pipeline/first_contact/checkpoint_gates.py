"""The gates that need no GPU: the site, the published files, the tokenizer, and the image of a small campaign."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.campaign.errors import ConfigError, IntegrityError
from pipeline.campaign.facts import facts_of, load_constitution
from pipeline.campaign.layout import CODE_ROOT
from pipeline.cluster import doctor
from pipeline.cluster.site_check import Check
from pipeline.execution import base_weights
from pipeline.first_contact import stages
from pipeline.first_contact.visit import Visit
from pipeline.rounds import arms, init
from pipeline.sandbox import entries

IN_THE_IMAGE = "the weights are in the image, so there is no folder to compare"
SHA256 = re.compile(r"([0-9a-f]{64}) [ *](?:\./)?(\S.*)")


def site(visit: Visit) -> Check:
    """The checks of `doctor`, as one: bad with the first that is bad. The weights have a gate of their own."""
    checks = doctor.examine(visit.chosen, with_weights=False)
    bad = [check for check in checks if check.verdict == "bad"]
    unknown = [f"{check.name} ({check.found})" for check in checks if check.verdict == "unknown"]
    if bad:
        others = (
            f" (and {len(bad) - 1} more; `python -m pipeline doctor` with the same words lists all)" if bad[1:] else ""
        )
        return Check("site", "bad", f"{bad[0].name}: {bad[0].found}{others}", bad[0].cure)
    told = f"; not known: {'; '.join(unknown)}" if unknown else ""
    return Check("site", "good", f"{len(checks) - len(unknown)} checks are good{told}")


def reading(visit: Visit) -> str:
    """What comparing the published files takes: their bytes are read only for digests."""
    folder = Path(visit.chosen.cluster.weights_dir)
    if (
        not visit.sha256
        or not visit.chosen.cluster.weights_dir
        or not base_weights.are_outside(visit.chosen.to_dict()["model"])
    ):
        return "seconds"
    gigabytes = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
    return f"reads {gigabytes:.1f} GB once: a minute for each 60 GB at 1 GB/s"


def checkpoint(visit: Visit) -> Check:
    """Names, shapes and sizes of the published files against the model, then their digests against a list, if one was given.

    The gate `image` takes the digests of all files, so without a list none is taken here.
    """
    model = visit.chosen.to_dict()["model"]
    if not base_weights.are_outside(model):
        return Check("checkpoint", "good", IN_THE_IMAGE)
    folder = visit.chosen.cluster.weights_dir
    base_weights.published_files(folder)
    with model_file(visit) as path:
        found = substrate("formats.published_weights", folder, "--model", path)
    if not visit.sha256:
        return Check(
            "checkpoint", "good", f"{found}; their digests are taken as they are (--sha256 FILE compares them)"
        )
    manifest = base_weights.build_manifest(folder)
    compared = compare_digests(visit.sha256, {name: entry["sha256"] for name, entry in manifest["files"].items()})
    return Check("checkpoint", "good", f"{found}; {compared} digests are those of {visit.sha256}")


def compare_digests(path: Path, digests: dict[str, str]) -> int:
    """Compare files with a list as `sha256sum` prints it, and return how many were compared.

    digests: name -> sha256 of the published files. Raises ConfigError for a list that cannot be read or names none of the files, IntegrityError
    for the first file that differs.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--sha256 {path} cannot be read: {error}", "Give a file that `sha256sum *` wrote") from None
    num_compared = 0
    for line in lines:
        match = SHA256.fullmatch(line.strip())
        if not match:
            raise ConfigError(
                f"--sha256 {path} has the line {line[:80]!r}", "Valid: 64 hex digits, two blanks, a file's name"
            )
        expected, name = match.groups()
        if name in digests:
            num_compared += 1
            if digests[name] != expected:
                raise IntegrityError(
                    f"{name} has sha256 {digests[name][:16]}, but {path} names {expected[:16]}",
                    "Copy the published file again, or ask where the list is from",
                )
    if not num_compared:
        raise ConfigError(
            f"--sha256 {path} names none of {', '.join(sorted(digests))}", "Make the list in the same folder"
        )
    return num_compared


def tokenizer(visit: Visit) -> Check:
    """Special ids and chat template of the published folder, by the image's own reader."""
    if not base_weights.are_outside(visit.chosen.to_dict()["model"]):
        return Check("tokenizer", "good", "the image brings its own tokenizer")
    with model_file(visit) as path:
        return Check(
            "tokenizer",
            "good",
            substrate("formats.published_tokenizer", visit.chosen.cluster.weights_dir, "--model", path),
        )


@contextmanager
def model_file(visit: Visit) -> Iterator[str]:
    """The path of a file with the configured model, for the image's own code."""
    with tempfile.TemporaryDirectory(prefix="first-contact-") as scratch:
        path = Path(scratch, "model.json")
        path.write_text(json.dumps(visit.chosen.to_dict()["model"]))
        yield str(path)


def freeze_probe(visit: Visit) -> Check:
    """Freeze the small campaign, as `init` freezes a real one, whose axes are checked here too. One that was cut short is made anew."""
    remove_probe(visit)
    arms.check_axes(visit.chosen, load_constitution())
    init.init(visit.probe, visit.probe_overrides, is_probe=True)
    size = visit.probe.image.stat().st_size / 2**20
    digest = facts_of(visit.probe)["image"]["tree_digest"]
    return Check("image", "good", f"an image of {size:.1f} MiB with tree digest {digest[:16]}; {visit.probe.folder}")


def remove_probe(visit: Visit) -> None:
    """Remove the small campaign, after its jobs have ended. Raises as `stages.end_jobs`."""
    if visit.probe.folder.exists():
        if visit.probe_round.config.exists():
            stages.end_jobs(visit.probe_round)
        shutil.rmtree(visit.probe.folder)


def substrate(entry: str, *arguments: str) -> str:
    """Run an entry of this checkout's substrate and return what it printed. Raises ConfigError with its sentence and cure."""
    done = entries.run(CODE_ROOT, entry, arguments)
    if done.returncode:
        raise ConfigError(*entries.refusal_of(done))
    return done.stdout.strip()
