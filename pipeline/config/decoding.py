"""How an arm decodes: how long that takes, by playing it, and what the word `auto` stands for.

    parallelism.judge_tp=auto   the GPUs of one replica: of the numbers that memory allows, the one with which the play ends first
    tasks.engine=auto           vllm where the site has it and it serves the model and the adapters, else native

`auto` is settled when a configuration is composed, so no later code meets the word. `init` freezes what was settled, with its reason, and
later rounds are composed with that.
"""

from __future__ import annotations

import heapq
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.campaign.errors import ConfigError
from pipeline.config import footprint, model_size
from pipeline.config.schema import Settings

Settled = Mapping[str, Mapping[str, str]]
"""What `auto` was settled as: key -> {"value", "because"}, as in campaign.yaml."""
AUTO = "auto"
ENGINE, ENGINE_VERSION, JUDGE_TP = "tasks.engine", "tasks.engine_version", "parallelism.judge_tp"
LEAST_VLLM = (0, 12, 0)
"""The first version with all of Nemotron-H with experts, by vLLM's own guide (docs.vllm.ai/projects/recipes, Nemotron-3-Nano-30B-A3B)."""
OUTSIDE = "weights.json"  # names weights of a published checkpoint, which alone vLLM reads


def take_auto(plain: dict[str, Any]) -> set[str]:
    """Put a value in the place of each `auto` until it is settled. Returns the keys that had it. plain: a configuration, not checked yet."""
    asked = set()
    for key, value in ((JUDGE_TP, 1), (ENGINE, "native")):
        part, _, name = key.partition(".")
        if isinstance(plain.get(part), dict) and plain[part].get(name) == AUTO:
            plain[part][name] = value
            asked.add(key)
    return asked


def settle(
    chosen: Settings, asked: Collection[str], plain: Mapping[str, Any], merged: Callable[[Mapping[str, Any]], Settings]
) -> Settings:
    """Return the settings with the values and the reasons of what was `auto`.

    asked: what `take_auto` returned. plain: what it left, from which `merged` makes settings, because what a job asks of Slurm follows from
    the size of a replica.
    """
    reasons = {}
    if JUDGE_TP in asked:
        given = [(plain["cluster"].get(role) or {}).get("gpus") for role in ("reference", "judge")]
        number, reasons[JUDGE_TP] = settle_judge_tp(chosen, min(filter(None, given), default=0))
        chosen = merged({**plain, "parallelism": {**plain["parallelism"], "judge_tp": number}})
    if ENGINE in asked:
        chosen.tasks.engine, chosen.tasks.engine_version, reasons[ENGINE] = settle_engine(chosen)
    chosen.reasons = reasons
    return chosen


def settle_judge_tp(chosen: Settings, most: int = 0) -> tuple[int, str]:
    """Return the number of GPUs of one replica for `auto`, and why. most: GPUs that the configuration gives a job which judges; 0: not said.

    The last replica to end counts. Of equal times the smaller number is taken, because its ranks exchange less.
    """
    if not chosen.cluster.gpus_per_node:
        return 1, "the site has no GPUs (cluster.gpus_per_node is 0), and each core holds a replica"
    gpus, num_items = chosen.devices_of("worker"), chosen.items_of("dev") + chosen.items_of("fresh")
    if gpus == 1:
        return 1, "an arm has one GPU"
    found, too_large = {}, []
    for number in _numbers(chosen, min(gpus, most or gpus)):
        changed = replace(chosen, parallelism=replace(chosen.parallelism, judge_tp=number))
        if not _fits(changed):
            too_large.append(number)
        elif chosen.cluster.capacity.has_rates:
            found[number] = assumed_decoding(changed, num_items)
        else:
            found[number] = 0.0
    if not found:  # the plan of the memory refuses this, and says what lowers it
        return max(too_large, default=1), "no number of GPUs has the memory that decoding needs"
    best = min(found, key=lambda number: (found[number], number))
    memory = f"; with {_listed(too_large)} a rank does not fit into its memory" if too_large else ""
    if not chosen.cluster.capacity.has_rates:
        return best, f"no rates are known (cluster.capacity), and fewer ranks exchange less{memory}"
    others = "".join(
        f", {seconds:,.0f} s with {_shape(number, gpus)}" for number, seconds in found.items() if number != best
    )
    return (
        best,
        f"{num_items:,} items are forecast to take {found[best]:,.0f} s with {_shape(best, gpus)}{others}{memory}",
    )


def _numbers(chosen: Settings, most: int) -> list[int]:
    """Return the sizes of a replica that divide an arm's GPUs of a node, and by which the model can be split."""
    model = chosen.to_dict()["model"]
    try:
        model_size.check_model(model)
    except ConfigError:  # said when the sizes are checked
        return [1]
    return [n for n in model_size.valid_tp(model) if n <= most and chosen.devices_of("worker") % n == 0]


def _fits(chosen: Settings) -> bool:
    """Whether a rank that decodes fits into a GPU of the site; true where its memory is not known."""
    config = chosen.to_dict()
    limit = chosen.cluster.capacity.gpu_memory_gib * 2**30
    try:
        needed = footprint.decoding(
            config["model"], chosen.parallelism.judge_tp, config["tasks"], config["recipe"]["lora"]
        )
    except ConfigError:  # an unknown LoRA target, which is said when the sizes are checked
        return True
    return not limit or needed.peak + footprint.DEVICE_RESERVE_BYTES <= limit


def _shape(number: int, gpus: int) -> str:
    replicas = gpus // number
    return f"{replicas} replica{'s' * (replicas > 1)} of {number} GPU{'s' * (number > 1)}"


def _listed(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))


def settle_engine(chosen: Settings) -> tuple[str, str, str]:
    """Return (engine, its version, why) for `auto`. The version of vLLM is read from the files of its runtime; that of native is empty.

    Raises ConfigError where tasks.engine_version names another version than the one that decodes.
    """
    version, why = _vllm(chosen)
    wanted, engine = chosen.tasks.engine_version, f"vllm {version}" if version else "native"
    if wanted and wanted != version:
        raise ConfigError(
            f"{ENGINE_VERSION} = {wanted}, but {ENGINE} = auto takes {engine}, because {why}",
            f"Leave {ENGINE_VERSION} empty, or name {ENGINE}=vllm and the runtime that has this version (cluster.vllm_runtime)",
        )
    return ("vllm" if version else "native"), version, why


def _vllm(chosen: Settings) -> tuple[str, str]:
    """Return (the version of vLLM that decodes, why); the version is empty where native decodes."""
    runtime = chosen.cluster.vllm_runtime
    if not chosen.cluster.gpus_per_node:
        return "", "the site has no GPUs (cluster.gpus_per_node is 0), and vLLM is for GPUs"
    if not runtime:
        return "", "cluster.vllm_runtime names no runtime that has vLLM"
    if Path(chosen.model.weights).name != OUTSIDE:
        return "", "vLLM reads published checkpoints alone, and the weights of this model are inside the image"
    if others := sorted(_reached(chosen) - _dense(chosen)):
        return "", f"nobody has checked adapters on {', '.join(others)} with vLLM; tasks.engine=vllm takes it even so"
    version = installed_vllm(runtime)
    if not version:
        hint = "where only the nodes see it, name tasks.engine=vllm and tasks.engine_version"
        return "", f"no vLLM is seen in cluster.vllm_runtime = {runtime} from this machine; {hint}"
    if _order_of(version) < (LEAST_VLLM, True):
        least = ".".join(map(str, LEAST_VLLM))
        return "", f"vLLM {version} in {runtime} is older than {least}, the first that serves this kind of model"
    kinds = ", ".join(sorted(set(chosen.model.pattern)))
    return (
        version,
        f"vLLM {version} is in {runtime}, and it serves layers of the kinds {kinds} with adapters in PEFT's form",
    )


def _reached(chosen: Settings) -> set[str]:
    """Return the LoRA targets of the reference recipe and of every recipe that an axis makes."""
    axes = [choice for axis in chosen.policy.axes if axis.key == "recipe.lora.targets" for choice in axis.choices]
    return {*chosen.recipe.lora.targets, *(target for choice in axes for target in choice.split(","))}


def _dense(chosen: Settings) -> set[str]:
    """Return the LoRA targets that are dense linear layers, which every version of vLLM since LEAST_VLLM takes adapters on."""
    shapes = model_size.lora_shapes(chosen.to_dict()["model"])
    return {name for name, (kind, _, _) in shapes.items() if kind and not name.startswith("experts.")}


def words_of(settled: Settled) -> list[str]:
    """Return the overrides that a campaign froze for `auto`. A version is quoted, because Hydra takes 0.10 for a number."""
    return [
        f"{key}='{each['value']}'" if key == ENGINE_VERSION else f"{key}={each['value']}"
        for key, each in sorted(settled.items())
    ]


def settled_of(chosen: Settings) -> dict[str, dict[str, str]]:
    """Return what `auto` was settled as in this configuration, for campaign.yaml."""
    values = {ENGINE: chosen.tasks.engine, JUDGE_TP: str(chosen.parallelism.judge_tp)}
    settled = {key: {"value": values[key], "because": because} for key, because in chosen.reasons.items()}
    if ENGINE in settled and chosen.tasks.engine_version:
        settled[ENGINE_VERSION] = {"value": chosen.tasks.engine_version, "because": "the runtime has this version"}
    return settled


def in_words(chosen: Settings, settled: Settled) -> list[str]:
    """Return the lines that say which engine decodes, and by how many GPUs or cores each replica, with the reasons."""
    engine = f"{chosen.tasks.engine} {chosen.tasks.engine_version}".strip()
    number, what = chosen.parallelism.judge_tp, "GPU" if chosen.cluster.gpus_per_node else "core"
    values = {ENGINE: f"engine: {engine}", JUDGE_TP: f"a replica that decodes: {number} {what}{'s' * (number > 1)}"}
    return [
        f"{value}, because {settled[key]['because']}" if key in settled else f"{value}, because {key} says so"
        for key, value in values.items()
    ]


def installed_vllm(runtime: str) -> str:
    """Return the version of vLLM in a virtual environment, by the files that pip leaves there; empty where there is none."""
    found = Path(runtime).glob("lib*/python3*/site-packages/vllm-*.dist-info")
    versions = [path.name.removeprefix("vllm-").removesuffix(".dist-info") for path in found]
    return max(versions, key=_order_of, default="")


def _order_of(version: str) -> tuple[tuple[int, ...], bool]:
    """Return (the numbers that a version begins with, whether it is released), by which versions are ordered: 0.12.0rc1+cu129 is before 0.12.0."""
    public = version.partition("+")[0]
    return tuple(int(number) for number in re.findall(r"\d+", public)[:3]), not re.search(r"(a|b|rc|dev)\d", public)


def assumed_decoding(chosen: Settings, num_items: int, role: str = "worker") -> float:
    """Return the seconds that judging an adapter decodes so many items in a job of this role, by the rates of the site's file."""
    capacity, lengths, layout = chosen.cluster.capacity, expected_lengths(chosen, num_items), chosen.parallelism
    slots, replicas = chosen.tasks.decode_batch_size, layout.replicas(chosen.devices_of(role))
    return played(lengths, slots, capacity.decode_tokens_per_second, replicas) / capacity.speed_up(layout.judge_tp)


def expected_lengths(chosen: Settings, num_items: int) -> list[int]:
    """Return the tokens of each completion that is judged, as `tasks.expected` has them."""
    expected = chosen.tasks.expected
    return expected.lengths(num_items, chosen.tasks.max_new_tokens, round(expected.share_at_limit * num_items))


def played(lengths: Sequence[int], slots: int, rates: Mapping[int, float], replicas: int = 1) -> float:
    """Return the seconds of decoding with continuous batching. lengths: of the completions, in the order in which they are taken.

    slots: how many at once. rates: tokens per second by the number of sequences at once, both of one replica. Each replica takes every
    so-manieth completion (substrate/inference/queue.py), and the last of them to end counts.
    """
    if replicas > 1:
        return max(played(lengths[first::replicas], slots, rates) for first in range(replicas))
    waiting = iter(lengths)
    ends = list(islice(waiting, slots))  # the step at which each slot is free again
    heapq.heapify(ends)
    step, seconds = 0, 0.0
    while ends:
        end = ends[0]
        seconds += (end - step) * step_seconds(len(ends), rates)
        step = end
        following = next(waiting, None)
        if following is None:
            heapq.heappop(ends)
        else:
            heapq.heapreplace(ends, end + following)
    return seconds


def step_seconds(busy: int, rates: Mapping[int, float]) -> float:
    """Return the seconds of one decoding step with so many sequences: between two measured numbers on the line, beyond them as at the nearest.

    Beyond the largest, a step takes longer in proportion.
    """
    known = sorted(rates)
    times = [slots / rates[slots] for slots in known]
    above = bisect_left(known, busy)
    if above == len(known):
        return times[-1] * busy / known[-1]
    if above == 0:
        return times[0]
    low, high = known[above - 1], known[above]
    return times[above - 1] + (times[above] - times[above - 1]) * (busy - low) / (high - low)
