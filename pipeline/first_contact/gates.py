"""The gates in their order, and the walk through them: it stops at the first that is bad, and does not repeat those that were passed.

    site         the checks of `doctor`                                         seconds
    checkpoint   names and shapes of the published files, digests on demand     seconds
    tokenizer    special ids and chat template                                  seconds
    image        the image, and a small campaign, are frozen                    a reading of the files
    forward      one forward pass, against stored log-probabilities if given    one job: the weights are loaded once
    steps        ten training steps by a worker                                 one job
    items        some twenty items that the worker judged                       the same job
    arm          the reference of the real campaign, which its first round uses the hours of one arm

The person says how far to go. What was passed is kept in `gates.json` and holds as long as configuration, code and files stay the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.campaign import canonical
from pipeline.campaign.errors import PipelineError
from pipeline.campaign.files import exclusive_lock, file_digest, read_json, write_file
from pipeline.campaign.layout import CODE_ROOT
from pipeline.cluster.site_check import Check
from pipeline.config import settings
from pipeline.execution import base_weights
from pipeline.first_contact import checkpoint_gates, node_gates
from pipeline.first_contact.visit import Visit
from pipeline.rounds import init


@dataclass(frozen=True)
class Gate:
    """One gate. question: what it answers. cost: what it takes, in words. look: makes the check, whose PipelineError counts as bad."""

    name: str
    question: str
    cost: Callable[[Visit], str]
    look: Callable[[Visit], Check]


def _words(text: str) -> Callable[[Visit], str]:
    return lambda visit: text


GATES = (
    Gate("site", "Can this machine or site run an arm?", _words("about half a minute"), checkpoint_gates.site),
    Gate("checkpoint", "Are the published files whole, and of the configured model?", checkpoint_gates.reading,
         checkpoint_gates.checkpoint),
    Gate("tokenizer", "Do special ids and chat template fit our prompts?", _words("seconds"), checkpoint_gates.tokenizer),
    Gate("image", "Can the image be built and a campaign be frozen?", _words("a minute, and a reading of the files"), checkpoint_gates.freeze_probe),
    Gate("forward", "Does the model compute what others compute?", node_gates.one_job, node_gates.forward),
    Gate("steps", "Does it train?", node_gates.one_job, node_gates.steps),
    Gate("items", "Does it answer, and does an answer end?", _words("in the job of `steps`"), node_gates.items),
    Gate("arm", "Does one whole arm work?", node_gates.one_arm, node_gates.arm),
)  # fmt: skip
NAMES = tuple(gate.name for gate in GATES)
DEFAULT_UNTIL = "items"


@dataclass(frozen=True)
class Passed:
    """What a gate said. seconds: what it took. is_new: False if an earlier first contact passed it."""

    gate: str
    verdict: str
    found: str
    cure: str
    seconds: float
    is_new: bool = True


def walk(visit: Visit, until: str = DEFAULT_UNTIL, *, again: bool = False) -> Iterator[Passed]:
    """Yield what each gate says, up to `until` or the first that is bad. again: repeat the gates that were passed before.

    Raises ConfigError while another first contact works in the same folder, and as `visit.check`.
    """
    visit.check()
    key = key_of(visit)
    visit.folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(visit.folder / ".lock", "`first-contact`"):
        known = _known(visit)
        if again or known.get("key") != key:
            checkpoint_gates.remove_probe(visit)
            known = {"key": key, "passed": {}}
            _save(visit, known)
        for gate in GATES[: NAMES.index(until) + 1]:
            if gate.name in known["passed"]:
                yield Passed(**known["passed"][gate.name] | {"is_new": False})
                continue
            visit.say(f"{gate.name}: {gate.question} ({gate.cost(visit)})")
            began = time.monotonic()
            try:
                check = gate.look(visit)
            except PipelineError as error:
                check = Check(gate.name, "bad", error.what, error.cure)
            passed = Passed(gate.name, check.verdict, check.found, check.cure, round(time.monotonic() - began, 1))
            if check.verdict != "bad":
                known["passed"][gate.name] = asdict(passed)
                _save(visit, known)
            yield passed
            if check.verdict == "bad":
                return


def key_of(visit: Visit) -> str:
    """A digest of what the verdicts rest on: the composed configuration, the code, and the files of the checkpoint and to compare with.

    The two kinds of files count with their sizes and times, because reading a checkpoint takes minutes.
    """
    given = [str(path.resolve()) for path in (visit.log_probs, visit.sha256) if path]
    files = [path for path in given if Path(path).is_file()]
    weights_dir = visit.chosen.cluster.weights_dir
    if base_weights.are_outside(visit.chosen.to_dict()["model"]):
        with suppress(PipelineError):  # the gate `checkpoint` says what is wrong with the folder
            files += [str(Path(weights_dir, name)) for name in base_weights.published_files(weights_dir)]
    stats = {path: [Path(path).stat().st_size, str(Path(path).stat().st_mtime_ns)] for path in files}
    code = {str(path): file_digest(path) for path in _code()}
    configuration = canonical.digest_text(settings.to_yaml(visit.chosen))
    return canonical.digest({"configuration": configuration, "code": code, "given": given, "files": stats})


def _code() -> Iterator[Path]:
    """The files of this checkout that the probe freezes or puts into its image."""
    for name in (*init.FROZEN_CODE, "substrate"):
        yield from (path for path in sorted((CODE_ROOT / name).rglob("*")) if path.is_file() and path.suffix != ".pyc")


def _known(visit: Visit) -> dict[str, Any]:
    """What earlier first contacts passed; empty if there was none, or if the file is damaged."""
    with suppress(OSError, PipelineError, TypeError, KeyError):
        known: dict[str, Any] = read_json(visit.folder / "gates.json")
        for passed in known["passed"].values():
            Passed(**passed)
        return known
    return {}


def _save(visit: Visit, known: dict[str, Any]) -> None:
    write_file(visit.folder / "gates.json", json.dumps(known, indent=1))
