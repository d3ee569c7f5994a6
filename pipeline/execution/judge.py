"""Judge an adapter by processes from the pristine image, each in a sandbox of its own. None of them runs code of a trial.

    items     seed -> prompts and answers         gets the seed, no adapter
    overlap   prompts + data card -> repeated     gets digests of the prompts that the trial learned from
    generate  adapter + prompts -> completions    gets no answer, and nothing that a trial wrote but its checked adapter
    score     completions + answers -> outcomes   uses the standard library alone, gets no adapter

Prompts and answers are separate files from the start. The completions are kept, so anybody can score them again.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.campaign.errors import FilesUnreachable, IntegrityError, Interrupted
from pipeline.campaign.files import append_new, copy_file, copy_tree, read_json, rows_of, write_file
from pipeline.config import settings
from pipeline.config.settings import Settings
from pipeline.execution import image_process
from pipeline.execution.data_card import refuse_overlap
from pipeline.sandbox import entries, image
from pipeline.sandbox.kernel_cache import Kernels


class Mark(Protocol):
    """Records that a phase begins now, or that it began at `at` (seconds since the epoch)."""

    def __call__(self, phase: str, at: float | None = None) -> None: ...


Look = Callable[[Mapping[str, Path], Path], None]


def _unmarked(phase: str, at: float | None = None) -> None:
    """Record nothing, where nobody follows the judging."""


@dataclass
class Judged:
    """The result of judging, by set: rows of `/items/<set>` and completions in item-id order, and `raw`, the bytes that generate wrote."""

    items: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    completions: dict[str, list[str]] = field(default_factory=dict)
    raw: dict[str, bytes] = field(default_factory=dict)
    engine: str = ""  # name and version, on which a score depends


COPY_SECONDS = 2.0  # between two copies of the journals: a lost node costs at most the items that ended in that time


@dataclass
class Decoding:
    """Copies the journals of finished items out of the node, so that a later judging decodes the others alone.

    A journal grows by one line for each item. A copy may end in the middle of a line; the process that decodes reads whole lines
    only. `sampling` holds temperature and seed; decoding is greedy without them.
    """

    out_dir: Path
    kept_dir: Path | None
    stop_wanted: Callable[[], bool]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    _copied: float = -math.inf  # when the journals were copied last

    def restore(self) -> None:
        """Make the process's /out with the journals that an earlier judging kept."""
        self.out_dir.mkdir(parents=True)
        for path in self._journals(self.kept_dir):
            copy_file(path, self.out_dir / path.name)

    def watch(self) -> None:
        """Copy out what is new; a copy that fails, on a full disk, is tried again. Raises Interrupted when the job is to stop."""
        is_stopped, kept = self.stop_wanted(), "its finished items are kept"
        if self.kept_dir and (is_stopped or time.monotonic() - self._copied >= COPY_SECONDS):
            self._copied = time.monotonic()
            try:
                for path in self._journals(self.out_dir):
                    with suppress(FileNotFoundError):  # the process removes its journals once every set has its file
                        append_new(path, self.kept_dir / path.name)
            except (OSError, FilesUnreachable) as error:
                kept = f"its newest items are not kept: {error}"
        if is_stopped:
            raise Interrupted(f"the arm was stopped while judging, and {kept}", "Start the arm again and it resumes")

    def _journals(self, folder: Path | None) -> list[Path]:
        return sorted(folder.glob("journal.*.jsonl")) if folder else []


def judge(
    root: Path,
    chosen: Settings,
    adapter_dir: Path | None,
    seeds: Mapping[str, Seeds],
    scratch_dir: Path,
    log_path: Path,
    mark: Mark = _unmarked,
    decoded_dir: Path | None = None,
    stop_wanted: Callable[[], bool] = lambda: False,
    data_card: Path | None = None,
    item_folders: Mapping[str, Path] | None = None,
    sampling: Mapping[str, Any] | None = None,
    kernels: Kernels | None = None,
    look: Look = lambda folders, work: None,
) -> Judged:
    """Score an adapter, or the base model for None, on the sets in `seeds` and in `item_folders`.

    root: of the mounted image. mark: called as each phase begins. decoded_dir: keeps journals of finished items, from which an
    interrupted judging of the same adapter resumes. data_card: of the adapter's trial. item_folders: set -> folder with prompts.jsonl
    and answers.jsonl that exist already. sampling: temperature and seed of the decoding; greedy without. kernels: of this node.
    look: is shown the sets before anything is decoded (set -> folder with prompts.jsonl and answers.jsonl, a folder for its work).
    Raises TrialFailed (judge_failed) with the end of the log, or (contaminated) where the card names an item; IntegrityError where a
    process wrote a wrong file; Interrupted where `stop_wanted` returns true while decoding.
    """
    with tempfile.TemporaryDirectory(prefix="judge-", dir=scratch_dir) as folder:
        work = Path(folder)
        inputs = work / "in"
        inputs.mkdir(mode=0o755)
        mark("items")
        folders = dict(item_folders or {})
        for item_set, seed in seeds.items():
            folders[item_set] = make_items(root, chosen, item_set, seed, work / f"items-{item_set}", log_path)
        sets = list(folders)
        for item_set in sets:
            shutil.copyfile(folders[item_set] / "prompts.jsonl", inputs / f"{item_set}.jsonl")
        if data_card is not None:
            refuse_overlap(root, data_card, inputs, sets, work, log_path)
        look(folders, work)
        if adapter_dir is not None:
            copy_tree(adapter_dir, inputs / "adapter")
        mark("generate_start")
        decoding = Decoding(work / "generate" / "out", decoded_dir, stop_wanted, sampling or {})
        completions = generate(
            root, chosen, sets, adapter_dir is not None, inputs, work / "generate", log_path, mark, decoding, kernels
        )
        mark("score")
        judged = Judged(engine=engine_of(completions, chosen))
        for item_set in sets:
            answers = folders[item_set] / "answers.jsonl"
            judged.items[item_set] = score(
                root, completions / f"{item_set}.jsonl", answers, work / f"score-{item_set}", log_path
            )
            judged.raw[item_set] = (completions / f"{item_set}.jsonl").read_bytes()
            texts = {row["item_id"]: row["completion"] for row in rows_of(completions / f"{item_set}.jsonl")}
            judged.completions[item_set] = [texts[row["item_id"]] for row in judged.items[item_set]]
        return judged


def judge_once(
    sqsh: Path,
    tree_digest: str,
    chosen: Settings,
    adapter_dir: Path | None,
    seeds: Mapping[str, Seeds],
    log_dir: Path,
    stop_wanted: Callable[[], bool] = lambda: False,
) -> Judged:
    """Mount the image, judge once as `judge`, and unmount. log_dir: gets judge.log, and journals of finished items meanwhile."""
    log_dir.mkdir(parents=True, exist_ok=True)
    log_path, kept = log_dir / "judge.log", log_dir / "decoded"
    with tempfile.TemporaryDirectory(prefix="judge-", dir=chosen.cluster.scratch_dir or None) as scratch:
        with image.mounted(sqsh, tree_digest, Path(scratch)) as mount:
            place = Path(scratch)
            kernels = image_process.warm_kernels(mount, chosen, place, log_dir / "warm_up.log", may_fill=False)
            judged = judge(
                mount.root, chosen, adapter_dir, seeds, place, log_path,
                decoded_dir=kept, stop_wanted=stop_wanted, kernels=kernels,
            )  # fmt: skip
    shutil.rmtree(kept, ignore_errors=True)
    return judged


Seeds = str | Mapping[str, str]
"""The seed of one set as hex, or one per family, where some families have new dev items."""


def dev_seeds(secrets: Mapping[str, str], families: Sequence[str], repaired: Mapping[str, str]) -> Seeds:
    """Return the seed or seeds of the dev set. secrets: the vault's seeds by name. repaired: family -> first round with new dev items."""
    if not repaired:
        return secrets["dev"]
    return {name: secrets[f"dev/{repaired[name]}" if name in repaired else "dev"] for name in families}


def make_items(root: Path, chosen: Settings, item_set: str, seeds: Seeds, work: Path, log_path: Path) -> Path:
    """Make the items of one set: dev, fresh, or the generated rows of the local board.

    Returns the folder with prompts.jsonl and answers.jsonl.
    """
    tasks, board = chosen.tasks, chosen.external
    num_items, shift, slices = {
        "dev": (
            tasks.num_dev_per_family,
            0,
            entries.dev_slices(tasks.dev_slices, dict(settings.policy_of(chosen).repaired)),
        ),
        "fresh": (tasks.num_fresh_per_family, 0, {}),
        "board": (board.generated_rows // len(tasks.families), board.shift, {}),
    }[item_set]
    by_family = seeds if isinstance(seeds, Mapping) else dict.fromkeys(tasks.families, seeds)
    parts = []
    for number, config in enumerate(
        entries.item_configs(by_family, tasks.families, tasks.level, num_items, shift, slices)
    ):
        paths = {"exclude": f"/substrate/{entries.EXCLUDED}", "out": "/out"}
        parts.append(image_process.run(root, "items", config, paths, {}, work / f"{number}", log_path))
    for name, text in entries.join_items(parts).items():
        write_file(work / "out" / name, text)
    return work / "out"


def generate(
    root: Path,
    chosen: Settings,
    sets: Sequence[str],
    has_adapter: bool,
    inputs: Path,
    work: Path,
    log_path: Path,
    mark: Mark,
    decoding: Decoding,
    kernels: Kernels | None,
) -> Path:
    """Decode the prompts of each set; returns the folder with `<set>.jsonl` of completions and engine.json."""
    layout = {**asdict(chosen.parallelism), "tp": chosen.parallelism.judge_tp, "pp": 1, "ep": 1, "cp": 1, "dp": 1}
    layout["judge_replicas"] = image_process.judge_replicas(chosen)
    how = {"max_new_tokens": chosen.tasks.max_new_tokens, "batch_size": chosen.tasks.decode_batch_size}
    how |= decoding.sampling
    config = {"model": asdict(chosen.model), "parallelism": layout, "decoding": how}
    base, bound = image_process.base_of(root, chosen)
    paths = {
        "base": base,
        "tokenizer": "/substrate/base/tokenizer.json",
        "adapter": "/in/adapter" if has_adapter else None,
        "sets": {name: f"/in/{name}.jsonl" for name in sets},
        "out": "/out",
    }
    decoding.restore()
    entry = "generate" if chosen.tasks.engine == "native" else f"generate_{chosen.tasks.engine}"
    out = image_process.run(
        root, entry, config, paths, {"/in": inputs, **bound}, work, log_path, decoding.watch, chosen, kernels
    )
    mark("generate", at=time.time() - rows_of(out / "progress.jsonl")[-1]["seconds"])
    return out


def engine_of(completions: Path, chosen: Settings) -> str:
    """Return name and version of the engine that decoded. Raises IntegrityError where the configuration names another one."""
    engine = read_json(completions / "engine.json")
    name, version = engine["engine"], engine["version"]
    if name != chosen.tasks.engine or (chosen.tasks.engine_version and version != chosen.tasks.engine_version):
        raise IntegrityError(
            f"{name} {version} decoded, but the campaign's scores come from {chosen.tasks.engine} {chosen.tasks.engine_version}",
            "Set cluster.vllm_runtime to a runtime with that version, or start a campaign with this one",
        )
    return f"{name} {version}"


def score(root: Path, completions: Path, answers: Path, work: Path, log_path: Path) -> list[dict[str, Any]]:
    """Score completions; returns one row per item in item-id order. Raises IntegrityError for a row of another schema."""
    inputs = work / "in"
    inputs.mkdir(parents=True, mode=0o755)
    shutil.copyfile(completions, inputs / "completions.jsonl")
    shutil.copyfile(answers, inputs / "answers.jsonl")
    arguments = [
        "--completions",
        "/in/completions.jsonl",
        "--answers",
        "/in/answers.jsonl",
        "--out",
        "/out/scores.jsonl",
    ]
    rows = rows_of(image_process.start(root, "score", arguments, {"/in": inputs}, work, log_path) / "scores.jsonl")
    for row in rows:
        if set(row) != {"item_id", "family", "correct", "answer", "num_tokens", "truncated"} or row["correct"] not in (
            0,
            1,
        ):
            raise IntegrityError(f"substrate.score wrote a row that does not fit its schema: {str(row)[:200]}")
    return rows
