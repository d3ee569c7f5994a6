"""Compare our LoRA step with transformers and peft: same weights, tokens and targets, float32, one thread, in one process.

    python -m bench.model [--models tiny small] [--batch 8] [--length 128] [--repeats 9]

Both sides do forward, backward and AdamW on the same random tokens, in turn. The table has the median of each side, their ratio (above 1
ours is faster) and both losses, which must agree. `--profile` also shows where the time of our step goes.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
warnings.filterwarnings("ignore")

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import yaml  # noqa: E402

from substrate.distributed.groups import Parallel, start  # noqa: E402
from substrate.model import ModelConfig, add_lora, build_model, init_weights, save_base, token_log_probs  # noqa: E402
from substrate.model.published import num_published_parameters  # noqa: E402

CONFIGS = Path(__file__).resolve().parent.parent / "hydra_conf" / "model"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "shared_experts.up_proj", "shared_experts.down_proj"]
RANK, ALPHA = 16, 32


def stepper(parameters: list[torch.nn.Parameter], loss_of: Callable[[], torch.Tensor]) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def both_sides(
    config: ModelConfig, parallel: Parallel, tokens: torch.Tensor, labels: torch.Tensor
) -> tuple[Callable[[], float], Callable[[], float]]:
    """Our step and theirs, from the same random weights."""
    ours = build_model(config, parallel)
    init_weights(ours, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        save_base(ours, folder)
        Path(folder, "config.json").write_text(json.dumps(config.to_transformers()))
        theirs = transformers.NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.config.use_cache = False
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    theirs = peft.get_peft_model(theirs, lora).train()
    mine = add_lora(ours.train(), RANK, ALPHA, 0.0, TARGETS, seed=2)
    foreign = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    cross_entropy = torch.nn.functional.cross_entropy
    return (
        stepper(mine, lambda: -token_log_probs(ours, tokens, labels).mean()),
        stepper(foreign, lambda: cross_entropy(theirs(tokens).logits.flatten(0, 1), labels.flatten())),
    )


def milliseconds(step: Callable[[], float]) -> float:
    begun = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - begun)


def profile(step: Callable[[], float]) -> str:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        step()
    return recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "small"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(
        f"batch {arguments.batch} x {arguments.length} tokens, one thread, float32, LoRA rank {RANK}; medians of {arguments.repeats}"
    )
    print(f"{'model':<8}{'parameters':>12}{'ours ms':>10}{'theirs ms':>11}{'ratio':>8}   loss of the first step")
    parallel = start({axis: 1 for axis in ("tp", "pp", "ep", "cp", "dp")})
    for name in arguments.models:
        config = ModelConfig.from_dict(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(3, config.vocab_size, (arguments.batch, arguments.length + 1), generator=generator)
        ours, theirs = both_sides(config, parallel, tokens[:, :-1], tokens[:, 1:])
        losses = [step() for step in (ours, theirs)]  # of the base model, because LoRA's B is zero; also warms up
        times = [(milliseconds(ours), milliseconds(theirs)) for _ in range(arguments.repeats)]
        mine, foreign = (statistics.median(side) for side in zip(*times, strict=True))
        size = f"{num_published_parameters(config) / 1e6:.1f} M"
        print(
            f"{name:<8}{size:>12}{mine:>10.1f}{foreign:>11.1f}{foreign / mine:>8.2f}   {losses[0]:.5f} {losses[1]:.5f}"
        )
        if arguments.profile:
            print(profile(ours))


if __name__ == "__main__":
    main()
