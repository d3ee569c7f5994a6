"""What a job may ask of Slurm, and what an external target may be: which values and flags, which of them together, and why others would be
misunderstood.

Every rule is (whether it holds, key, value, what is valid), as settings.py reports it.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pipeline.campaign.records import NUM_ARMS
from pipeline.config.policy_schema import OWN_FLAGS, Worker
from pipeline.config.requests import FLAGS_FOR_GPUS, MEMORY, Request, gpus_of, gres_entries
from pipeline.config.schema import Cluster, External, Recipe, Tasks

Rule = tuple[bool, str, object, str]
TEXTS = ("partition", "account", "qos", "reservation", "constraint", "gpu_type", "gres", *MEMORY)
WORDS = "words in one line, without a backslash and without blanks around them"
INSTEAD = {
    **{name.replace("_", "-"): name for name in (*TEXTS, "gpus_per_node", "cpus_per_task", "cpus_per_gpu") if name != "gpu_type"},
    "time": "time_limit_minutes", "gpus": "gpus_per_node", "gpus-per-socket": "gpus_per_node", "tres-per-task": "gpus_per_node",
}  # fmt: skip
"""Flag -> the key that takes its place."""
SET_HERE = (
    "array", "autocomplete", "chdir", "cluster-constraint", "clusters", "comment", "container", "container-id", "dependency", "error", "export",
    "export-file", "get-user-env", "gid", "help", "hold", "input", "job-name", "no-kill", "no-requeue", "nodes", "ntasks", "ntasks-per-core",
    "ntasks-per-gpu", "ntasks-per-node", "ntasks-per-socket", "open-mode", "output", "parsable", "quiet", "requeue", "signal", "tasks-per-node",
    "test-only", "uid", "usage", "verbose", "version", "wait", "workdir", "wrap",
)  # fmt: skip
"""Flags that the pipeline sets itself, with which it could not read sbatch's answer, or with which a job would start elsewhere, as another
user, not by itself, or go on without a node."""
TAKEN = (
    "acctg-freq", "batch", "bb", "bbf", "begin", "contiguous", "core-spec", "cores-per-socket", "cpu-freq", "deadline", "delay-boot",
    "distribution", "exclude", "exclusive", "extra-node-info", "gpu-bind", "gpu-freq", "gpus-per-task", "gres-flags", "hint", "ignore-pbs",
    "kill-on-invalid-dep", "licenses", "mail-type", "mail-user", "mcs-label", "mem-bind", "mincpus", "network", "nice", "nodefile", "nodelist",
    "overcommit", "oversubscribe", "power", "prefer", "priority", "profile", "propagate", "reboot", "sockets-per-node", "spread-job", "switches",
    "thread-spec", "threads-per-core", "time-min", "tmp", "use-min-nodes", "wait-all-nodes", "wckey",
)  # fmt: skip
"""The other flags of sbatch(1), which are given as they are, like those that a site's plugins add; shortened they would pass the rules."""
DIRECTIVES = ("#SBATCH", "#SLURM", "#PBS", "#BSUB", "#BB", "#DW")
"""Beginnings of comments that sbatch, or its plugin for burst buffers, reads in a script."""


def of_setup(setup: Iterable[str]) -> Rule:
    """The rule of the shell lines of `cluster.setup`: sbatch reads flags also among them, and takes those of PBS and LSF."""
    flags = [line for text in setup for line in text.splitlines() if line.lstrip().startswith(DIRECTIVES)]
    return (
        not flags,
        "cluster.setup",
        flags,
        "shell lines; a flag of sbatch belongs into cluster.sbatch, where it is checked",
    )


def of_whole_nodes(flags: Mapping[str, str]) -> Iterator[Rule]:
    """Yield the rules of free flags for an arm of several nodes, whose ranks have the host's network: no other job may be there.

    flags: of `cluster.sbatch`.
    """
    for flag, valid in (
        ("exclusive", "true, or leave it out; the pipeline asks for whole nodes"),
        ("oversubscribe", "not set"),
    ):
        value = flags.get(flag)
        holds = value is None or (flag == "exclusive" and value == "")
        yield (
            holds,
            f"cluster.sbatch.{flag}",
            value or "true",
            f"{valid}: an arm of several nodes shares them with nobody, nor with its own user",
        )


def of_request(request: Request, role: str) -> Iterator[Rule]:
    """Yield what a role's request must fulfil."""
    at = "cluster." if role == "worker" else f"cluster.{role}."
    gpus, on_node, minutes = request.gpus, request.gpus_per_node, request.time_limit_minutes
    is_shared = gpus < on_node and "exclusive" not in request.sbatch  # other jobs may have the rest of the node
    texts = {name: getattr(request, name) for name in TEXTS}
    memory = {name: texts[name] for name in MEMORY if texts[name]}
    asked = gpus_of(request.gres)
    found = [
        *((is_plain(text), name, repr(text), WORDS) for name, text in texts.items()),
        (on_node >= 0, "gpus_per_node", on_node, "a number >= 0"),
        (0 <= gpus <= on_node, "gpus", gpus, f"0 to {at}gpus_per_node = {on_node}, the GPUs of a node"),
        (not re.search(r"[^\w.+-]", request.gpu_type), "gpu_type", request.gpu_type, "one type of GPU, such as h200"),
        (gres_entries(request.gres) is not None, "gres", request.gres, "names with a type and a number, such as gpu:h200:8,lscratch:100"),
        (asked in (None, gpus), "gres", request.gres,
         f"{at}gpus_per_node = {on_node} GPUs, of which each job asks for those that it needs, here {gpus}; or change that"),
        (asked is None or not request.gpu_type, "gpu_type", request.gpu_type,
         f"empty, and {at}gpus_per_node = {on_node} without a type, because {at}gres = {request.gres} asks for the GPUs"),
        (asked is None or "gpus-per-task" not in request.sbatch, "sbatch.gpus-per-task", "set", f"not set, because {at}gres asks for the GPUs"),
        (request.cpus_per_gpu >= 0, "cpus_per_gpu", request.cpus_per_gpu, "a number >= 0"),
        (gpus > 0 or not request.cpus_per_gpu, "cpus_per_gpu", request.cpus_per_gpu, "0, because this job asks for no GPU"),
        (request.cpus_per_task >= 1, "cpus_per_task", request.cpus_per_task, "a number > 0"),
        (len(memory) <= 1, " and ".join(memory), " and ".join(memory.values()), "one of them, and the others empty, because sbatch takes no two"),
        *((has_unit(name, text), name, text, "a whole number with its unit, such as 900G; for mem also 0, all that a node has")
          for name, text in memory.items()),
        (gpus > 0 or not request.mem_per_gpu, "mem_per_gpu", request.mem_per_gpu, "empty, because this job asks for no GPU"),
        (request.mem != "0" or not is_shared, "mem", request.mem,
         f"the memory of a node with its unit, such as 900G, or mem_per_gpu: this job gets {gpus} of the node's {on_node} GPUs, and 0 would take "
         "the memory of the jobs beside it"),
        (minutes > 0, "time_limit_minutes", minutes, "a number > 0"),
    ]  # fmt: skip
    yield from ((holds, at + key, value, valid) for holds, key, value, valid in found)
    for name, value in request.sbatch.items():
        yield from _of_flag(name, value, at, gpus)


def is_plain(text: str) -> bool:
    """Whether sbatch reads a quoted text of an #SBATCH line as it is. It takes a backslash away, in quotes too."""
    return text == text.strip() and text.isprintable() and "\\" not in text


def has_unit(name: str, text: str) -> bool:
    """Whether a memory is what its writer means: sbatch would take a bare 900 for megabytes."""
    return bool(re.fullmatch(r"0*[1-9]\d*[KMGT]B?", text, re.IGNORECASE)) or (name == "mem" and text == "0")


def _of_flag(name: str, value: str, at: str, gpus: int) -> Iterator[Rule]:
    key = f"{at}sbatch.{name}"
    yield (
        bool(re.fullmatch("[a-z][a-z0-9-]+", name)),
        key,
        value,
        "the long name of a flag of sbatch, without the dashes before it",
    )
    yield name not in INSTEAD, key, value, f"{at}{INSTEAD.get(name)} in its place"
    needs = (
        f"flags that the pipeline does not need itself; it sets --{name}, or could not read what sbatch prints with it, "
        "or its jobs would not run as it started them"
    )
    yield name not in SET_HERE, key, value, needs
    known = (*INSTEAD, *SET_HERE, *TAKEN)
    long = next((each for each in known if each.startswith(name) and name not in known), "")
    yield not long, key, value, f"whole names of flags; sbatch takes --{name} for --{long}"
    yield is_plain(value), key, repr(value), WORDS
    yield gpus > 0 or name not in FLAGS_FOR_GPUS, key, value, "flags that a job without GPUs may have"
    if name == "gpus-per-task":
        fits = bool(re.fullmatch(rf"([\w.+-]+:)?{gpus}", value))
        yield fits, key, value, f"the GPUs of a node or of the job, {gpus}, because one task runs on a node"


def rules_of_server(worker: Worker, cluster: Cluster) -> list[Rule]:
    """Return the rules of a round that serves its agents' model itself; none for another round."""
    server, words = worker.server, [word.partition("=")[0] for word in worker.server.arguments]
    own = [word for word in words if word.lstrip("-").replace("_", "-") in OWN_FLAGS and word.startswith("-")]
    has_key = bool(worker.endpoint.api_key_env or worker.endpoint.api_key_file)
    return [
        (bool(cluster.vllm_runtime), "cluster.vllm_runtime", "empty",
         "the folder of a virtual environment with vLLM, which worker.endpoint.url=served starts; or the address of another endpoint"),
        (bool(server.weights_dir or cluster.weights_dir), "worker.server.weights_dir", "empty",
         "the folder of a published checkpoint, or set cluster.weights_dir where the campaign's own weights are one; vLLM reads none in an image"),
        (bool(server.tool_call_parser), "worker.server.tool_call_parser", "empty",
         "vLLM's name for the form of the model's tool calls, such as qwen3_coder; `vllm serve --help=tool-call-parser` lists them"),
        (not cluster.gpus_per_node or cluster.agent.gpus > 0, "cluster.agent.gpus", cluster.agent.gpus,
         "1 or more, because the job of the model server needs GPUs; null takes parallelism.judge_tp"),
        (cluster.kind != "local" or not cluster.gpus_per_node or cluster.gpus + cluster.agent.gpus <= cluster.gpus_per_node,
         "cluster.gpus_per_node", cluster.gpus_per_node,
         f"{cluster.gpus + cluster.agent.gpus} or more, because an arm and the model server run here at the same time; or another endpoint"),
        (not has_key, "worker.endpoint.api_key_env and api_key_file", "set", "neither with worker.endpoint.url=served, which makes a key of its own"),
        (not own, "worker.server.arguments", own, f"none of {', '.join(OWN_FLAGS)}, which follow from other settings"),
        (server.wait_seconds > 0, "worker.server.wait_seconds", server.wait_seconds, "a number > 0"),
        (server.restarts >= 0, "worker.server.restarts", server.restarts, "0 or more"),
    ] if worker.is_served else []  # fmt: skip


def of_external(target: External, tasks: Tasks) -> list[tuple[bool, str, object, str]]:
    """Return the rules of the external target as (whether it holds, key, value, what is valid)."""
    kind, is_local = target.kind, target.kind == "local"
    kinds = ("none", "local", "kaggle", "command", "manual")
    return [
        (kind in kinds, "external.kind", kind, ", ".join(kinds)),
        (target.push in ("meta", "login"), "external.push", target.push, "meta or login"),
        (kind in ("kaggle", "command") or target.push == "meta", "external.push", target.push, f"meta, with external={kind}"),
        (target.score in ("public", "private"), "external.score", target.score, "public or private"),
        (0 <= target.submissions <= NUM_ARMS, "external.submissions", target.submissions, f"0 to {NUM_ARMS}"),
        (kind == "none" or target.submissions > 0, "external.submissions", target.submissions, f"at least 1, with external={kind}"),
        (kind == "none" or target.rows >= len(tasks.families), "external.rows", target.rows,
         f"at least {len(tasks.families)}, one of each family, with external={kind}"),
        (not is_local or not 0 < target.generated_rows < len(tasks.families), "external.real_share", target.real_share,
         "a share that leaves no generated row or at least one of each family"),
        (not is_local or target.shift < 100, "external.shift", target.shift, "0 to 99"),
        (0 <= target.real_share <= 1, "external.real_share", target.real_share, "0 to 1"),
        (not target.real_share or (is_local and bool(tasks.train_csv)), "external.real_share", target.real_share,
         "0 without external=local and tasks.train_csv, from which the held-out real rows come"),
        (kind != "kaggle" or bool(target.competition), "external.competition", "empty", "the last part of the address of the competition"),
        (kind != "command" or bool(target.command), "external.command", "empty", "the site's scorer and its arguments"),
    ]  # fmt: skip


def of_puzzles(recipe: Recipe, tasks: Tasks) -> list[Rule]:
    """Return the rules of families, level and slices. Whether a family has a feature is known to the image, which is asked when a campaign begins."""
    limits = list(tasks.dev_slices.values())
    are_limits = all(isinstance(each, dict) and each and all(map(_are_ends, each.values())) for each in limits)
    return [
        (bool(tasks.families), "tasks.families", tasks.families, "at least one family"),
        (len(set(tasks.families)) == len(tasks.families), "tasks.families", tasks.families, "each family once"),
        (tasks.level in ("small", "full"), "tasks.level", tasks.level, "small or full"),
        (set(tasks.dev_slices) <= set(tasks.families), "tasks.dev_slices", sorted(tasks.dev_slices), f"families of {tasks.families}"),
        (are_limits, "tasks.dev_slices", tasks.dev_slices,
         "low and high of one feature at least of each family, two finite numbers"),
        (0 <= recipe.slice_share <= 1 and (not recipe.slice_share or bool(tasks.dev_slices)), "recipe.slice_share", recipe.slice_share,
         "0 to 1 where tasks.dev_slices names a slice, else 0"),
    ]  # fmt: skip


def _are_ends(value: object) -> bool:
    """Whether a value has two numbers, `low` and `high`."""
    if (
        not isinstance(value, dict)
        or set(value) != {"low", "high"}
        or not all(type(end) in (int, float) and abs(end) <= sys.float_info.max for end in value.values())
    ):
        return False
    return bool(value["low"] <= value["high"])


def of_floats(values: Any, key: str = "") -> Iterator[Rule]:
    """Yield a rule for every float of a configuration: it must be finite."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from of_floats(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, float):
        yield math.isfinite(values), key, values, "a finite number"
