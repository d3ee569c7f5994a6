"""What `doctor` checks of the programs and endpoints that a configuration needs outside of the pipeline: the board's client, the proposer, the
agents' model, the runtime of vLLM. These are looked for and connected to, and nothing is sent.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.cluster.site_check import Check, make_check
from pipeline.config import decoding, settings
from pipeline.config.decoding import Settled
from pipeline.config.policy_schema import ModelEndpoint, Proposals

CONNECT_SECONDS = 3.0
IMPORT_SECONDS = 180.0  # vLLM imports torch from a file system of the site


def examine(chosen: settings.Settings) -> Iterator[Check]:
    """Check what the external target, the proposer and the agents of a configuration need. Yields nothing for what is not configured."""
    yield from _board(chosen)
    yield from _proposer(chosen.policy.proposals)
    yield from _agents(chosen)


def decoding_engine(chosen: settings.Settings, settled: Settled) -> Iterator[Check]:
    """Say which engine decodes and why, and check that its runtime imports the version that the scores come from.

    settled: what `auto` was settled as, as in campaign.yaml.
    """
    engine, replica = decoding.in_words(chosen, settled)
    yield Check("engine", "good", engine.partition(": ")[2])
    yield Check("replicas", "good", replica)
    if chosen.tasks.engine != "vllm":
        return
    python, wanted = Path(chosen.cluster.vllm_runtime, "bin", "python"), chosen.tasks.engine_version
    found = f"{python} is no program here"
    if os.access(python, os.X_OK):
        found = _version_by_import(python)
    cure = f"set cluster.vllm_runtime to a virtual environment with vLLM {wanted}"
    yield make_check(
        "engine vllm", found == wanted, f"{found} is imported" if found == wanted else found, cure, _elsewhere(chosen)
    )


def _version_by_import(python: Path) -> str:
    """Import vLLM as a worker does. Returns its version, or what went wrong."""
    try:
        done = subprocess.run([python, "-P", "-c", "import vllm; print(vllm.__version__)"], capture_output=True, text=True,
                              timeout=IMPORT_SECONDS, check=False)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{python} could not import vllm: {error}"
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return f"{python} could not import vllm: {last}" if done.returncode else (done.stdout.split() or ["no version"])[-1]


def _elsewhere(chosen: settings.Settings) -> str:
    """The verdict on what is missing here: it is needed on the nodes of a Slurm site, which may have it."""
    return "bad" if chosen.cluster.kind == "local" else "unknown"


def _board(chosen: settings.Settings) -> Iterator[Check]:
    """The client of the board. The meta job sends, or with external.push=login a person on this machine."""
    target = chosen.external
    missing = "bad" if target.push == "login" else _elsewhere(chosen)
    if target.kind == "kaggle":
        path = shutil.which("kaggle")
        yield make_check("program kaggle", bool(path), path or "not on PATH", "pip install kaggle", missing)
        folders = [os.environ.get("KAGGLE_CONFIG_DIR"), "~/.kaggle", "~/.config/kaggle"]
        files = [
            Path(folder, name).expanduser()
            for folder in folders
            if folder
            for name in ("kaggle.json", "access_token", "credentials.json")
        ]
        place = next((str(file) for file in files if file.is_file()), "")
        if os.environ.get("KAGGLE_API_TOKEN") or (os.environ.get("KAGGLE_USERNAME") and os.environ.get("KAGGLE_KEY")):
            place = (
                "in the environment, which jobs do not get" if chosen.cluster.kind == "slurm" else "in the environment"
            )
        yield make_check("kaggle's credentials", bool(place), place or "neither a file nor variables",
                         "put the token of kaggle.com/settings into ~/.kaggle/kaggle.json (chmod 600)", "unknown")  # fmt: skip
    elif target.kind == "command":
        for key, words in (("external.command", target.command), ("external.poll_command", target.poll_command)):
            if words:
                path = shutil.which(words[0])
                yield make_check(f"program of {key}", bool(path), path or f"{words[0]} is no program here",
                                 f"put it on PATH, or give {key} its whole path", missing)  # fmt: skip


def _proposer(proposals: Proposals) -> Iterator[Check]:
    """The proposer, which is asked when a round is frozen."""
    if proposals.kind == "optuna":
        found = importlib.util.find_spec("optuna") is not None
        yield make_check(
            "optuna", found, "installed" if found else "not installed", "pip install '.[optuna]' into .venv"
        )
    if proposals.kind != "llm":
        return
    yield from _endpoint(proposals, "proposer's", "policy.proposals", "where rounds are frozen")


def _agents(chosen: settings.Settings) -> Iterator[Check]:
    """What answers agents: an endpoint, or the model that a job of the round serves. Scripted ones need nothing."""
    worker = chosen.worker
    if worker.agent == "none" or worker.scenarios:
        return
    if not worker.is_served:
        yield from _endpoint(worker.endpoint, "agents'", "worker.endpoint", "where arms run")
        return
    python, weights = (
        Path(chosen.cluster.vllm_runtime, "bin", "python"),
        worker.server.weights_dir or chosen.cluster.weights_dir,
    )
    for what, there, cure in (
        (str(python), os.access(python, os.X_OK), "set cluster.vllm_runtime to a virtual environment with vLLM"),
        (
            weights,
            Path(weights, "config.json").is_file(),
            "set worker.server.weights_dir or cluster.weights_dir to a published checkpoint",
        ),
    ):
        found = f"{what} is there" if there else f"{what} is not here"
        yield make_check("agents' model server", there, found, cure, _elsewhere(chosen))


def _endpoint(endpoint: ModelEndpoint, who: str, at: str, where: str) -> Iterator[Check]:
    """Whether somebody accepts connections at an endpoint, and whether its key is there. Nothing is sent."""
    problem = _unreachable(endpoint.url, at)
    yield make_check(f"{who} endpoint", not problem,
                     problem or f"{urlsplit(endpoint.url).hostname} accepts connections",
                     f"check {at}.url, and the network and proxy of this machine")  # fmt: skip
    name = f"{who} key"
    if endpoint.api_key_env:
        there = bool(os.environ.get(endpoint.api_key_env, "").strip())
        yield make_check(name, there, f"{endpoint.api_key_env} is {'set' if there else 'not set'}",
                         f"export {endpoint.api_key_env} {where}, or name a file in {at}.api_key_file")  # fmt: skip
    elif endpoint.api_key_file:
        path = Path(endpoint.api_key_file)
        there = path.is_file() and os.access(path, os.R_OK) and path.stat().st_size > 0
        yield make_check(name, there, f"{path} {'is there' if there else 'is no file with a key that you may read'}",
                         "put the key there, for you alone (chmod 600)")  # fmt: skip


def _unreachable(url: str, at: str) -> str:
    """Why nobody can be asked at this address; empty if somebody accepts a connection there. A proxy of the site is not used."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"https": 443, "http": 80}.get(parts.scheme)
    except ValueError:
        parts, port = urlsplit(""), None
    if not parts.hostname or port is None:
        return f"{at}.url is no address such as https://host/v1/chat/completions"
    proxied = os.environ.get(f"{parts.scheme}_proxy") or os.environ.get(f"{parts.scheme.upper()}_PROXY")
    try:
        socket.create_connection((parts.hostname, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return "" if proxied else f"no connection to {parts.hostname}:{port} ({error})"
    return ""
