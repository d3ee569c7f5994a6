"""Measure the host memory that reading a base checkpoint of 2 GB needs, at TP 1 and TP 2.

    python -m bench.weights

The benchmark writes bfloat16 shards with the published names to a temporary folder and loads them in fresh processes, which watch their
own anonymous memory (the kernel can drop mapped file pages). It prints for each rank the bytes of its part of the model, the peak above
what the process had before, the difference of the two, and the largest tensor of the file.
"""

import math
import os
import socket
import tempfile
import threading
import time
import warnings
from pathlib import Path

import torch
import torch.multiprocessing as mp
import yaml
from safetensors.torch import save_file

CONFIG = Path(__file__).resolve().parent.parent / "hydra_conf" / "model" / "nemotron3_nano_30b.yaml"
CHANGES = {"name": "bench", "pattern": "ME*M", "vocab_size": 32768, "num_experts": 72}
SHARD_BYTES = 500_000_000


def write_checkpoint(folder: Path, values: dict[str, object]) -> tuple[int, int]:
    """Write the shards. Returns the bytes of all tensors, and of the largest."""
    from substrate.model import ModelConfig
    from substrate.model.published import published_tensors

    tensors = published_tensors(ModelConfig.from_dict(values))
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}
    shard: dict[str, torch.Tensor] = {}
    sizes, number = [], 0
    for index, (name, (shape, dtype)) in enumerate(tensors.items()):
        shard[name] = torch.full(shape, 0.01, dtype=dtypes[dtype])
        sizes.append(shard[name].nbytes)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES or index == len(tensors) - 1:
            save_file(shard, folder / f"model-{number:05d}.safetensors")
            shard, number = {}, number + 1
    return sum(sizes), max(sizes)


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("no RssAnon in /proc/self/status; Linux 4.5 or newer is needed")


def rank_main(rank: int, tp: int, port: int, values: dict[str, object], folder: str, largest: int) -> None:
    warnings.filterwarnings("ignore")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(tp), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    from substrate.distributed.groups import start
    from substrate.model import ModelConfig, build_model, load_base

    model = build_model(ModelConfig.from_dict(values), start({"tp": tp, "pp": 1, "ep": 1, "cp": 1, "dp": 1}))
    part = sum(math.prod(t.shape) * t.element_size() for t in [*model.parameters(), *model.buffers()])
    before = peak = anonymous_bytes()  # the model's own pages have not been written yet
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    load_base(model, folder)
    seconds = time.perf_counter() - begun
    done.set()
    watcher.join()
    beyond = peak - before - part
    mb = 1e6
    print(
        f"tp={tp} rank {rank}: part {part / mb:.0f} MB, peak {(peak - before) / mb:.0f} MB, beyond the part {beyond / mb:.0f} MB, "
        f"largest tensor {largest / mb:.0f} MB, {seconds:.1f} s",
        flush=True,
    )


def main() -> None:
    values = yaml.safe_load(CONFIG.read_text()) | CHANGES
    with tempfile.TemporaryDirectory() as folder:
        total, largest = write_checkpoint(Path(folder), values)
        print(f"checkpoint of {total / 1e9:.2f} GB in {len(list(Path(folder).iterdir()))} shards")
        for tp in (1, 2):
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
            mp.spawn(rank_main, (tp, port, values, folder, largest), nprocs=tp)


if __name__ == "__main__":
    main()
