"""Judging: three processes from the pristine image, each in a sandbox of its own; none of them ever ran a trial's code.

    items     seed -> prompts and answers         sees the seed, no adapter
    generate  adapter + prompts -> completions    sees no answer, nothing that a trial wrote but its checked adapter
    score     completions + answers -> outcomes   stdlib only, sees no adapter

Prompts and answers are separate files from the start. Completions are kept, so that anybody can score them again.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline import devices, image, weights
from pipeline.errors import IntegrityError, Interrupted, TrialFailed
from pipeline.layout import read_json, write_file
from pipeline.sandbox import Limits, Sandbox
from pipeline.settings import Settings

SUBSTRATE_ENV = {
    "PYTHONPATH": "/substrate",
    "SUBSTRATE_ROOT": "/substrate",  # the entries refuse to run from anywhere else
    "OMP_NUM_THREADS": "1",  # ranks share the cores
    "TORCHDYNAMO_DISABLE": "1",  # compiling needs a C++ compiler on the node and buys nothing at these sizes
}

POLL_SECONDS = 0.1


class Mark(Protocol):
    """Told each phase as it begins, or afterwards when it began (seconds since the epoch)."""

    def __call__(self, phase: str, at: float | None = None) -> None: ...


def _unmarked(phase: str, at: float | None = None) -> None:
    """For a judging that nobody follows."""


@dataclass
class Judged:
    """Rows of `/items/<set>` and the completions, by set, both in item-id order; `raw` is what generate wrote, to the byte."""

    items: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    completions: dict[str, list[str]] = field(default_factory=dict)
    raw: dict[str, bytes] = field(default_factory=dict)
    engine: str = ""  # name and version: part of what a score is


@dataclass
class Decoding:
    """Shards of completions that outlive the node: copied out as they finish, taken up where an earlier judging left them.

    The pristine process writes each shard whole under its name, so what is found is whole.
    """

    out_dir: Path
    sets: list[str]
    kept_dir: Path | None
    stop_wanted: Callable[[], bool]

    def take_up(self) -> None:
        """Give the process what is there already."""
        self.out_dir.mkdir(parents=True)
        for path in self._shards(self.kept_dir):
            shutil.copyfile(path, self.out_dir / path.name)

    def watch(self) -> None:
        """Keep what is new. Raises Interrupted when the job is to stop."""
        if self.kept_dir:
            for path in self._shards(self.out_dir):
                if not (self.kept_dir / path.name).exists():
                    write_file(self.kept_dir / path.name, path.read_bytes())
        if self.stop_wanted():
            raise Interrupted("stopped while judging; finished shards are kept", "Start the arm again and it goes on")

    def _shards(self, folder: Path | None) -> list[Path]:
        return [path for name in self.sets for path in sorted(folder.glob(f"{name}.*jsonl"))] if folder else []


def judge(
    pristine: Path,
    chosen: Settings,
    adapter_dir: Path | None,
    seeds: Mapping[str, str],
    scratch_dir: Path,
    log_path: Path,
    mark: Mark = _unmarked,
    decoded_dir: Path | None = None,
    stop_wanted: Callable[[], bool] = lambda: False,
) -> Judged:
    """Score an adapter (None: the base as it is) on the sets whose seeds are given.

    pristine: root of the mounted image. `mark` is told each phase as it begins. decoded_dir: where shards of completions are kept
    as they finish, and taken from when an earlier judging of the same adapter was cut short.
    Raises TrialFailed (judge_failed) with the log's tail, IntegrityError when a process wrote what it should not, Interrupted when
    `stop_wanted` says so while decoding.
    """
    with tempfile.TemporaryDirectory(prefix="judge-", dir=scratch_dir) as folder:
        work = Path(folder)
        inputs = work / "in"
        inputs.mkdir(mode=0o755)
        mark("items")
        for item_set, seed in seeds.items():
            made = make_items(pristine, chosen, item_set, seed, work / f"items-{item_set}", log_path)
            shutil.copyfile(made / "prompts.jsonl", inputs / f"{item_set}.jsonl")
        if adapter_dir is not None:
            shutil.copytree(adapter_dir, inputs / "adapter")
        mark("generate_start")
        decoding = Decoding(work / "generate" / "out", list(seeds), decoded_dir, stop_wanted)
        completions = generate(
            pristine, chosen, list(seeds), adapter_dir is not None, inputs, work / "generate", log_path, mark, decoding
        )
        mark("score")
        judged = Judged(engine=engine_of(completions, chosen))
        for item_set in seeds:
            answers = work / f"items-{item_set}" / "out" / "answers.jsonl"
            judged.items[item_set] = score(
                pristine, completions / f"{item_set}.jsonl", answers, work / f"score-{item_set}", log_path
            )
            judged.raw[item_set] = (completions / f"{item_set}.jsonl").read_bytes()
            texts = {row["item_id"]: row["completion"] for row in _rows(completions / f"{item_set}.jsonl")}
            judged.completions[item_set] = [texts[row["item_id"]] for row in judged.items[item_set]]
        return judged


def judge_once(
    sqsh: Path, tree_digest: str, chosen: Settings, adapter_dir: Path | None, seeds: Mapping[str, str], log_dir: Path
) -> Judged:
    """Mount the image for one judging and nothing else; the log goes to `log_dir`."""
    log_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="judge-", dir=chosen.cluster.scratch_dir or None) as scratch:
        with image.mounted(sqsh, tree_digest, Path(scratch)) as mount:
            return judge(mount.root, chosen, adapter_dir, seeds, Path(scratch), log_dir / "judge.log")


def make_items(pristine: Path, chosen: Settings, item_set: str, seed_hex: str, work: Path, log_path: Path) -> Path:
    """The folder with prompts.jsonl and answers.jsonl of one set, dev or fresh."""
    tasks = chosen.tasks
    num_items = {"dev": tasks.num_dev_per_family, "fresh": tasks.num_fresh_per_family}[item_set]
    config = {
        "seed_hex": seed_hex,
        "families": list(tasks.families),
        "level": tasks.level,
        "num_items_per_family": num_items,
    }
    paths = {"exclude": "/substrate/data/train_prompts.sha256", "out": "/out"}
    return _run(pristine, "items", config, paths, {}, work, log_path)


def generate(
    pristine: Path,
    chosen: Settings,
    sets: Sequence[str],
    has_adapter: bool,
    inputs: Path,
    work: Path,
    log_path: Path,
    mark: Mark,
    decoding: Decoding,
) -> Path:
    """The folder with <set>.jsonl of completions."""
    layout = {**asdict(chosen.parallelism), "tp": chosen.parallelism.judge_tp, "pp": 1, "ep": 1, "cp": 1, "dp": 1}
    how = {"max_new_tokens": chosen.tasks.max_new_tokens, "batch_size": chosen.tasks.decode_batch_size}
    config = {"model": asdict(chosen.model), "parallelism": layout, "decoding": how}
    base, bound = base_of(pristine, chosen)
    paths = {
        "base": base,
        "tokenizer": "/substrate/base/tokenizer.json",
        "adapter": "/in/adapter" if has_adapter else None,
        "sets": {name: f"/in/{name}.jsonl" for name in sets},
        "out": "/out",
    }
    decoding.take_up()
    entry = "generate" if chosen.tasks.engine == "native" else f"generate_{chosen.tasks.engine}"
    out = _run(pristine, entry, config, paths, {"/in": inputs, **bound}, work, log_path, decoding.watch, chosen)
    decoding_seconds = sum({row["set"]: row["seconds"] for row in _rows(out / "progress.jsonl")}.values())
    mark("generate", at=time.time() - decoding_seconds)
    return out


def engine_of(completions: Path, chosen: Settings) -> str:
    """Name and version of what decoded. Raises IntegrityError when it is not the one that the configuration names."""
    found = read_json(completions / "engine.json")
    name, version = found["engine"], found["version"]
    if name != chosen.tasks.engine or (chosen.tasks.engine_version and version != chosen.tasks.engine_version):
        raise IntegrityError(
            f"{name} {version} decoded, the campaign's scores are those of {chosen.tasks.engine} {chosen.tasks.engine_version}",
            "Point cluster.vllm_runtime at that version, or start another campaign with this one",
        )
    return f"{name} {version}"


def base_of(pristine: Path, chosen: Settings) -> tuple[str, dict[str, Path]]:
    """(folder of the base weights inside a sandbox, what to bind for it); verified, and staged where the site asks for it."""
    if not weights.are_outside(asdict(chosen.model)):
        return "/substrate/base", {}
    cluster = chosen.cluster
    return "/base", {"/base": weights.ready(pristine / chosen.model.weights, cluster.weights_dir, cluster.stage_dir)}


def score(pristine: Path, completions: Path, answers: Path, work: Path, log_path: Path) -> list[dict[str, Any]]:
    """Rows of outcomes in item-id order, checked against the schema."""
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
    rows = _rows(_start(pristine, "score", arguments, {"/in": inputs}, work, log_path) / "scores.jsonl")
    for row in rows:
        if set(row) != {"item_id", "family", "correct", "answer", "num_tokens", "truncated"} or row["correct"] not in (
            0,
            1,
        ):
            raise IntegrityError(f"score wrote a row that is not of its schema: {str(row)[:200]}")
    return rows


def sandbox_of(chosen: Settings, read_only: Mapping[str, Path], read_write: Mapping[str, Path], **how: Any) -> Sandbox:
    """A sandbox for training or decoding: the substrate's variables, and of the node what the site's file says; how: of `Sandbox`.

    Raises WorkFailed where GPUs should be and none opens.
    """
    cluster = chosen.cluster
    node = devices.of_node(cluster.gpus_per_node, how.get("network", "loopback"))
    given: dict[str, Any] = {"env": {**SUBSTRATE_ENV, **node.env}, "devices": node.devices}
    given["limits"] = Limits(shm_size_bytes=cluster.shm_size_gib * 2**30)
    return Sandbox({**read_only, **node.read_only}, read_write, **(given | how))


def _run(
    pristine: Path,
    entry: str,
    config: Mapping[str, Any],
    paths: Mapping[str, Any],
    binds: Mapping[str, Path],
    work: Path,
    log_path: Path,
    watch: Callable[[], None] = lambda: None,
    chosen: Settings | None = None,
) -> Path:
    task_dir = work / "task"
    write_file(
        task_dir / "task.json", json.dumps({"schema": 1, "kind": entry, "config": config, "paths": paths}, indent=1)
    )
    return _start(pristine, entry, [], {"/task": task_dir, **binds}, work, log_path, watch, chosen)


def _start(
    pristine: Path,
    entry: str,
    arguments: Sequence[str],
    binds: Mapping[str, Path],
    work: Path,
    log_path: Path,
    watch: Callable[[], None] = lambda: None,
    chosen: Settings | None = None,
) -> Path:
    """Run `substrate.<entry>` from the pristine mount to its end, calling `watch` meanwhile; returns its /out.

    chosen: for the process that decodes, which gets the node's GPUs; the others need nothing of it.
    """
    out = work / "out"
    out.mkdir(parents=True, exist_ok=True)
    for inside, folder in binds.items():
        if inside != "/base":  # the site's own, and readable
            folder.chmod(0o755)
    seen, written = {"/substrate": pristine, **binds}, {"/out": out}
    python = "python"
    if chosen and chosen.tasks.engine == "vllm":
        runtime = Path(chosen.cluster.vllm_runtime)
        seen[str(runtime)], python = runtime, f"{runtime}/bin/python"
    sandbox = sandbox_of(chosen, seen, written) if chosen else Sandbox(seen, written, env=SUBSTRATE_ENV)
    with sandbox.start([python, "-P", "-m", f"substrate.{entry}", *arguments], log_path) as process:
        while process.poll() is None:
            watch()  # what it raises ends the process too
            time.sleep(POLL_SECONDS)
        code = process.returncode
    if code:
        tail = log_path.read_text(errors="replace")[-2000:]
        raise TrialFailed("judge_failed", f"substrate.{entry} ended with exit code {code}", tail)
    return out


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path.name} of a judging process cannot be read ({error})") from error
