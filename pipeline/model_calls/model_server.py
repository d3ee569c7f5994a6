"""Serve the agents' model for one round: start vLLM's server, say where it answers, start it again, and end when its work is over.

    rounds/r0001/agent_server/address.json   {"url", "start", "failed"}, while the server answers; written whole, removed at the end
    rounds/r0001/agent_server/vllm.log       what the server prints
    rounds/r0001/agent_server/use_NN.json    {"gpus", "began", "last", "job"}: seconds since the epoch, for the budget of article 4
    vault/agent_server/r0001.key, .pem       the API key, and the certificate with its private key; new at each start, mode 0600

The server runs as the user and in no sandbox: it is the site's own program, with the site's own weights. What it is asked comes from an agent
and is text. Its key reaches it through its environment, because everybody on the node can read a command line.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from pipeline.campaign import keys
from pipeline.campaign.errors import ConfigError, NotFound, WorkFailed
from pipeline.campaign.files import exclusive_lock, read_json, write_file
from pipeline.campaign.layout import Round
from pipeline.config.schema import Settings
from pipeline.model_calls import chat_request, served
from pipeline.model_calls.endpoint import Endpoint

POLL_SECONDS = 0.5
USE_SECONDS = 60.0  # between two notes of how long the server has had its GPUs
KILL_SECONDS = 20.0  # between SIGTERM and SIGKILL
ALIVE_SECONDS = 60.0  # between two questions whether the server still answers
MOST_SILENT = 5  # such questions in a row without an answer before it is started again; a busy one may miss some
# Runs a program in a session of its own, with a process beside it that ends the whole session once nobody holds the other end of stdin.
# SIGKILL of this stage, by hand or for lack of memory, would else leave vLLM and its engines with the GPUs. Linux's death signal of a parent
# (setpriv --pdeathsig) reaches the first process alone, and the engines are its children.
GUARDED = ("/bin/sh", "-c", 'exec 3<&0; (read -r _ <&3; kill -KILL -$$) & exec "$@" </dev/null 3<&-', "sh")
CHAT = "/v1/chat/completions"


def serve(
    folder: Round, chosen: Settings, arms: Sequence[str], stop_wanted: Callable[[], bool], report_line: Callable[[str], None]
) -> bool:  # fmt: skip
    """Serve until the arms have ended, or `stop_wanted` returns True. Returns whether they have ended.

    arms: as `served.arms_left`. While another process serves the round, this one waits, and takes its place after it.

    Raises ConfigError for a round that serves no model, NotFound where the site's runtime has no vLLM, WorkFailed once the server has ended by
    itself too often; the round's arms then hear of it at once.
    """
    if not chosen.worker.is_served:
        raise ConfigError(f"{folder.name} serves no model of its own", "Choose worker=served in a new campaign")

    def is_over() -> bool:
        return not served.arms_left(folder, arms, chosen.worker)

    program, restarts = Path(chosen.cluster.vllm_runtime) / "bin" / "vllm", chosen.worker.server.restarts
    folder.server_dir.mkdir(parents=True, exist_ok=True)
    if not program.exists():
        what = f"{program} is missing on {platform.node()}"
        _tell(folder, "", what)
        raise NotFound(what, "Set cluster.vllm_runtime to a virtual environment with vLLM, which this node sees")
    with ExitStack() as stack:
        note_use = stack.enter_context(_use(folder, chosen))
        while not _is_ours(stack, folder):
            if is_over() or stop_wanted():
                return is_over()
            note_use()
            time.sleep(POLL_SECONDS)
        for number in range(restarts + 1):
            with _started(folder, chosen, program) as (server, endpoint):
                is_told, silent, asked, deadline = False, 0, 0.0, time.monotonic() + chosen.worker.server.wait_seconds
                while server.poll() is None and silent < MOST_SILENT:
                    if is_over() or stop_wanted():
                        return is_over()
                    if not is_told and served.is_alive(endpoint):
                        is_told, asked = True, time.monotonic()
                        _tell(folder, endpoint.url)
                        report_line(f"{endpoint.model} is served at {endpoint.url}")
                    elif is_told and time.monotonic() - asked > ALIVE_SECONDS:
                        silent = 0 if served.is_alive(endpoint) else silent + 1
                        asked = time.monotonic()
                    if not is_told and time.monotonic() > deadline:
                        break
                    note_use()
                    time.sleep(POLL_SECONDS)
                code = server.poll()
            what = "stopped answering" if silent else "did not answer in time"
            what = f"ended with exit code {code}" if code is not None else what
            report_line(f"the model server {what}; {restarts - number} starts are left; {folder.server_log} says why")
    why = f"the model server {what}, {restarts + 1} times in all"
    _tell(folder, "", why)
    cure = "worker.server.arguments has further flags of `vllm serve`"
    raise WorkFailed(why, f"Read {folder.server_log}; {cure}")


def _is_ours(stack: ExitStack, folder: Round) -> bool:
    """Take the lock of the round's server, which `stack` then holds; False while another process has it."""
    try:
        stack.enter_context(exclusive_lock(folder.server_dir / ".lock", f"`serve` of {folder.name}"))
    except ConfigError:
        return False
    return True


def command(folder: Round, chosen: Settings, program: Path, host: str, port: int) -> list[str]:
    """The words of `vllm serve`. The flags are those of vllm/entrypoints/openai/cli_args.py and vllm/engine/arg_utils.py."""
    server, pem = chosen.worker.server, str(folder.server_certificate)
    weights = server.weights_dir or chosen.cluster.weights_dir
    gpus = chosen.cluster.agent.gpus
    return [
        str(program), "serve", weights, "--host", host, "--port", str(port), "--served-model-name", chosen.worker.endpoint.model,
        "--enable-auto-tool-choice", "--tool-call-parser", server.tool_call_parser,
        *(["--tensor-parallel-size", str(gpus)] if gpus else []),
        # vLLM asks for its API key below /v1 alone. So who calls must show the certificate too, and nobody else reaches it anywhere.
        "--ssl-keyfile", pem, "--ssl-certfile", pem, "--ssl-ca-certs", pem, "--ssl-cert-reqs", "2",
        *server.arguments,
    ]  # fmt: skip


@contextmanager
def _started(folder: Round, chosen: Settings, program: Path) -> Iterator[tuple[subprocess.Popen[bytes], Endpoint]]:
    """A running server, with a new port, key and certificate, and the endpoint that it will be. At the end nothing of it is left."""
    is_local = chosen.cluster.kind == "local"
    host, name = ("127.0.0.1", "localhost") if is_local else ("0.0.0.0", platform.node())
    port, key = _free_port(host), secrets.token_urlsafe(32)
    folder.server_key.parent.mkdir(mode=0o700, exist_ok=True)
    write_file(folder.server_key, key, mode=0o600)
    write_file(folder.server_certificate, keys.new_certificate(name), mode=0o600)
    endpoint = Endpoint(f"https://{name}:{port}{CHAT}", chosen.worker.endpoint.model, chat_request.USE)
    endpoint = replace(endpoint, api_key_file=str(folder.server_key), certificate=str(folder.server_certificate))
    quiet = {
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # the weights are here, and nobody is told that they are used
    # The frozen code, which PYTHONPATH names, is not vLLM's.
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    words = command(folder, chosen, program, host, port)
    try:
        with open(folder.server_log, "ab") as log:
            server = subprocess.Popen(
                [*GUARDED, *words], env=inherited | quiet | {"VLLM_API_KEY": key}, stdin=subprocess.PIPE, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        try:
            yield server, endpoint
        finally:
            folder.server_address.unlink(missing_ok=True)  # before the server ends, so that no worker calls a dying one
            _end(server)
            assert server.stdin is not None
            server.stdin.close()
    finally:
        folder.server_key.unlink(missing_ok=True)
        folder.server_certificate.unlink(missing_ok=True)


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server and every process that it started."""
    for number, seconds in ((signal.SIGTERM, KILL_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with suppress(subprocess.TimeoutExpired):
            server.wait(seconds)


def _tell(folder: Round, url: str, failed: str = "") -> None:
    content = {"url": url, "start": secrets.token_hex(8), "failed": failed}
    write_file(folder.server_address, json.dumps(content), mode=0o600)


def _free_port(host: str) -> int:
    """A port on which nobody listens now. Somebody may take it before the server does; the server then ends and is started again."""
    with socket.create_server((host, 0)) as found:
        return int(found.getsockname()[1])


@contextmanager
def _use(folder: Round, chosen: Settings) -> Iterator[Callable[[], None]]:
    """Note from when to when the server has its GPUs. What is yielded notes it now, if it is time to."""
    path = folder.server_dir / f"use_{len(list(folder.server_dir.glob('use_*.json'))):02d}.json"
    began, noted = time.time(), 0.0

    def note(*, now: bool = False) -> None:
        nonlocal noted
        if now or time.time() - noted >= USE_SECONDS:
            noted = time.time()
            content = {"gpus": chosen.cluster.agent.gpus, "began": began, "last": noted}
            write_file(path, json.dumps(content | {"job": os.environ.get("SLURM_JOB_ID", "")}))

    note()
    try:
        yield note
    finally:
        note(now=True)


def gpu_seconds(folder: Round) -> float:
    """The GPU-seconds that the servers of a round have had."""
    uses = [read_json(path) for path in sorted(folder.server_dir.glob("use_*.json"))]
    return sum(each["gpus"] * max(0.0, each["last"] - each["began"]) for each in uses)
