"""Starts the ranks of one node and returns the exit code on which they agree.

torchrun is not used because it turns every failure of a rank into exit code 1, and a trainer's 75 ("stopped, start me
again") is not a failure; it also imports torch before the first rank starts, 2 s on a busy CPU. Where a site starts the
ranks itself (srun, torchrun on several nodes), RANK and WORLD_SIZE are set and this module is not used.
"""

import os
import socket
import subprocess
import sys
import time

GRACE_SECONDS = 20.0  # that the other ranks have to end by themselves once one has failed
POLL_SECONDS = 0.05


def run_ranks(module: str, arguments: list[str], num_ranks: int) -> int:
    """Runs `python -P -m module arguments` for each rank of this node. Returns 0 or the first failed rank's exit code.

    If NUM_NODES is set, this is node NODE_RANK of them, and rank 0 listens at MASTER_ADDR and MASTER_PORT.

    A rank killed by a signal counts as 128 + signal and takes precedence, because its loss makes the others fail. If
    this process is killed, the ranks live on; in a sandbox they end with its pid namespace.
    """
    num_nodes, node = int(os.environ.get("NUM_NODES", 1)), int(os.environ.get("NODE_RANK", 0))
    num_local = num_ranks // num_nodes
    common = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_local)}
    if num_nodes == 1:
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    ranks = [common | {"RANK": str(node * num_local + n), "LOCAL_RANK": str(n)} for n in range(num_local)]
    return run_processes(module, arguments, ranks)


def run_replicas(module: str, arguments: list[str], num_replicas: int, devices_each: int) -> int:
    """Runs the module once for each replica of a model, with REPLICA and GPUs of its own. Returns as `run_ranks` does."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(number) for number in range(num_replicas * devices_each)]
    own = [",".join(devices[n * devices_each : (n + 1) * devices_each]) for n in range(num_replicas)]
    return run_processes(
        module, arguments, [{"REPLICA": str(n), "CUDA_VISIBLE_DEVICES": names} for n, names in enumerate(own)]
    )


def run_processes(module: str, arguments: list[str], environments: list[dict[str, str]]) -> int:
    """Runs `python -P -m module arguments` once with each set of further variables. Returns as `run_ranks` does."""
    command = [sys.executable, "-P", "-m", module, *arguments]
    ranks = [subprocess.Popen(command, env={**os.environ, **variables}) for variables in environments]
    first_failure, deadline = 0, float("inf")
    try:
        while any(rank.poll() is None for rank in ranks):
            failed = [rank.returncode for rank in ranks if rank.returncode]
            if failed and not first_failure:
                first_failure, deadline = failed[0], time.monotonic() + GRACE_SECONDS
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        codes = [
            code for rank in ranks if (code := rank.poll())
        ]  # taken before the ranks that did not end are killed below
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
    code = next((code for code in codes if code < 0), 0) or first_failure or next(iter(codes), 0)
    return code if code >= 0 else 128 - code


def _free_port() -> str:
    # Another process could take the port before rank 0 does, but a sandbox has its own loopback.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
