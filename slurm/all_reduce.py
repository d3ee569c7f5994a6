"""Check that a sandbox on this node sees its GPUs, and that two ranks in it reach each other.

    srun --gpus=2 python slurm/all_reduce.py

The check starts the same sandbox as a trial, with the same devices, driver libraries, /dev/shm and network setting, and runs an all-reduce
in it over NCCL (over gloo on a node without GPUs). It prints what it saw. The exit code is 0 if everything worked.

    gpus       2 x NVIDIA H200
    shm        32.0 GiB
    all-reduce 2 ranks over nccl, 256 MiB: the sum is right, 120.4 GB/s
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def inside(num_ranks: int, size_bytes: int) -> int:
    """Start the ranks in the sandbox and wait for them. Returns the largest exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-P", "/all_reduce.py", "--rank", "--bytes", str(size_bytes)]
    ranks = [subprocess.Popen(command, env={**os.environ, **common, "RANK": str(n)}) for n in range(num_ranks)]
    return max(abs(rank.wait()) for rank in ranks)


def rank(size_bytes: int) -> None:
    """Run one rank: sum a tensor over all ranks, check the sum, time it. Rank 0 prints what it saw as JSON."""
    import torch
    import torch.distributed as dist

    number, on_gpu = int(os.environ["RANK"]), torch.cuda.is_available()
    device = torch.device("cuda", number) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    world = dist.get_world_size()
    tensor = torch.full((size_bytes // 4,), float(number + 1), device=device)
    dist.all_reduce(tensor)
    right = bool((tensor == world * (world + 1) / 2).all())
    dist.barrier()
    began = time.perf_counter()
    for _ in range(5):
        dist.all_reduce(tensor)
    float(tensor[0].item())  # reading a value waits for the device
    seconds = (time.perf_counter() - began) / 5
    shm = os.statvfs("/dev/shm")
    seen = {
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if on_gpu else [],
        "shm_bytes": shm.f_frsize * shm.f_blocks,
        "backend": dist.get_backend(),
        "ranks": world,
        "bytes": size_bytes,
        "right": right,
        "bytes_per_second": 2 * (world - 1) / world * size_bytes / seconds,
    }
    if number == 0:
        print(json.dumps(seen), flush=True)
    dist.destroy_process_group()


def drill(overrides: list[str], num_ranks: int, size_bytes: int, log: Path) -> dict[str, Any]:
    """Run the ranks in a sandbox of the composed configuration. Returns what rank 0 saw. Raises WorkFailed if a rank fails."""
    from pipeline.config import settings
    from pipeline.execution import image_process

    chosen = settings.compose(overrides)
    confined = image_process.sandbox_of(
        chosen, {"/all_reduce.py": Path(__file__)}, {}, chosen.cluster.gpus, network=chosen.cluster.network
    )
    command = [
        sys.executable,
        "-P",
        "/all_reduce.py",
        "--inside",
        "--ranks",
        str(num_ranks),
        "--bytes",
        str(size_bytes),
    ]
    with confined.start(command, log) as process:
        code = process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("{")]
    if code or not lines:
        from pipeline.campaign.errors import WorkFailed

        raise WorkFailed(f"the check ended with exit code {code}: {log.read_text(errors='replace')[-2000:]}")
    return dict(json.loads(lines[-1]))


def outside(overrides: list[str], num_ranks: int, size_bytes: int) -> int:
    """Enter a private mount namespace on the node, run the check and print its result. Returns the exit code."""
    sys.path.insert(0, str(ROOT))
    from pipeline.campaign.errors import PipelineError
    from pipeline.sandbox.namespace import enter_private_namespace

    try:
        enter_private_namespace([sys.executable, *sys.argv])
        with tempfile.TemporaryDirectory(prefix="drill-") as folder:
            seen = drill(overrides, num_ranks, size_bytes, Path(folder, "all_reduce.log"))
    except PipelineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    gpus = seen["gpus"]
    print(f"gpus       {f'{len(gpus)} x {gpus[0]}' if gpus else 'none, so the check ran on CPUs'}")
    print(f"shm        {seen['shm_bytes'] / 2**30:.1f} GiB")
    verdict = "the sum is right" if seen["right"] else "THE SUM IS WRONG"
    rate = seen["bytes_per_second"] / 1e9
    print(
        f"all-reduce {seen['ranks']} ranks over {seen['backend']}, {seen['bytes'] / 2**20:.0f} MiB: {verdict}, {rate:.1f} GB/s"
    )
    return 0 if seen["right"] else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as cluster=slurm_pyxis")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--bytes", type=int, default=2**28)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank(arguments.bytes)
        return 0
    if arguments.inside:
        return inside(arguments.ranks, arguments.bytes)
    return outside(arguments.overrides, arguments.ranks, arguments.bytes)


if __name__ == "__main__":
    sys.exit(main())
