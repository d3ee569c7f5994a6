"""Measure everything that needs a GPU in one run: errors of kernels against float64, and speed and memory of LoRA steps and decoding.

    python -m bench.gpu                                        the 30B with random bf16 weights on one GPU
    python -m bench.gpu --model small --lengths 256 512 --batches 1 8 --new 16       the same code on any machine, in a minute
    python -m bench.gpu --theirs                               measures transformers with peft too, and prints the ratios

Speeds are medians. `share` is the rate of the model's useful matrix products divided by the rate of one large matrix product, measured in
the same run. A token costs 2 x active parameters forward, and as many again for the gradient of the inputs; recomputation is not counted.
`plan` is the peak memory that pipeline/config/footprint.py predicts, and `peak` is the allocator's, which a CPU does not have.
"""

import argparse
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import yaml  # noqa: E402

from pipeline.config import footprint  # noqa: E402
from substrate.distributed.groups import Parallel, start  # noqa: E402
from substrate.inference.decode import Decoding, decode  # noqa: E402
from substrate.model import HybridModel, ModelConfig, add_lora, build_model, token_log_probs  # noqa: E402
from substrate.ops import kernels  # noqa: E402
from substrate.ops.scan import chunked_scan  # noqa: E402

CONFIGS = Path(__file__).resolve().parent.parent / "hydra_conf" / "model"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "shared_experts.up_proj", "shared_experts.down_proj"]
LORA = {"rank": 32, "targets": TARGETS}
ALONE = {"tp": 1, "pp": 1, "ep": 1, "cp": 1, "dp": 1}
PROMPT_TOKENS = 64
GIB = 2**30
Rates = dict[str, dict[int, float]]
"""Tokens per second: "lengths" by the length of a training step, "batches" by the batch of decoding."""


def seconds(device: torch.device, work: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds of `repeats` runs after one to warm up. The device's queue is empty before and after each."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    work()
    taken = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of one large product."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(device, lambda: a @ b)


def kernel_errors(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Largest difference of each kernel from its plain form in float64, relative to the largest value."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def error(found: torch.Tensor, expected: torch.Tensor) -> float:
        return float((found.double() - expected).abs().max() / expected.abs().max())

    S, B, H, P, G, N, chunk = 512, 2, 16, 64, 4, 128, 128
    scan = (
        random(S, B, H, P),
        random(S, B, H).float().sigmoid(),
        -random(H).float().exp(),
        random(S, B, G, N),
        random(S, B, G, N),
    )
    exact = recurrence(*(each.double() for each in scan))
    errors = {"scan torch": error(chunked_scan(*scan, chunk)[0], exact)}
    if kernels.of(device).scan == "triton":
        errors["scan triton"] = error(kernels.triton_scan(*scan, chunk)[0], exact)
        errors |= step_errors(random, error, device)
    rows, weights, counts = random(96, 64), random(4, 128, 64), [40, 0, 50, 6]
    ends = torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
    each = zip(rows.double().split(counts), weights.double(), strict=True)
    errors["experts grouped"] = error(
        kernels.grouped_linear(rows, weights, ends), torch.cat([x @ weight.T for x, weight in each])
    )
    q, k, v = random(1, 8, 256, 64), random(1, 2, 256, 64), random(1, 2, 256, 64)
    attend = torch.nn.functional.scaled_dot_product_attention
    found = attend(q, k, v, is_causal=True, enable_gqa=True)
    errors["attention"] = error(found, attend(q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True))
    return errors


def step_errors(
    random: Callable[..., torch.Tensor], error: Callable[[torch.Tensor, torch.Tensor], float], device: torch.device
) -> dict[str, float]:
    """The same of the kernels of one decoding step: the recurrence of one token, and the gated norm."""
    B, H, P, G, N = 2, 16, 64, 4, 128
    state = torch.randn(B, H, P, N, device=device)
    x, dt, b, c = random(B, H, P), random(B, H), random(B, G, N), random(B, G, N)
    bias, A, D = torch.randn(H, device=device), -torch.rand(H, device=device) - 0.1, torch.randn(H, device=device)
    width = torch.nn.functional.softplus(dt.double() + bias)
    b_heads, c_heads = (t.double().repeat_interleave(H // G, 1) for t in (b, c))
    after = (width * A).exp()[..., None, None] * state.double()
    after = after + (width.unsqueeze(-1) * x.double()).unsqueeze(-1) * b_heads.unsqueeze(-2)
    expected = (after @ c_heads.unsqueeze(-1)).squeeze(-1) + D.double().unsqueeze(-1) * x.double()
    found = kernels.triton_step(state, x, dt, bias, A, D, b, c)
    y, z, weight = random(B, H * P).float(), random(B, H * P), random(H * P)
    gated = (y.double() * torch.nn.functional.silu(z.double())).unflatten(-1, (G, -1))
    normed = torch.nn.functional.rms_norm(gated, gated.shape[-1:], eps=1e-5).flatten(-2) * weight.double()
    return {
        "step triton": max(error(found, expected), error(state, after)),
        "norm triton": error(kernels.triton_gated_norm(y, z, weight, 1e-5, G), normed),
    }


def recurrence(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The scan token by token, in the type of its arguments: h = exp(dt A) h + dt x B^T, y = h C."""
    heads_per_group = x.shape[2] // b.shape[2]
    b, c = (t.repeat_interleave(heads_per_group, dim=2) for t in (b, c))
    state, outputs = x.new_zeros(*x.shape[1:], b.shape[-1]), []
    for x_t, dt_t, b_t, c_t in zip(x, dt, b, c, strict=True):
        state = state * (dt_t * A).exp()[..., None, None] + (dt_t.unsqueeze(-1) * x_t).unsqueeze(-1) * b_t.unsqueeze(-2)
        outputs.append((state @ c_t.unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs)


def random_model(config: ModelConfig, parallel: Parallel, recompute: bool, for_decoding: bool = False) -> HybridModel:
    """A model with random weights, made on the device, so that nobody has to read 63 GB."""
    model = build_model(config, parallel, recompute="full" if recompute else "none")
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("A_log_H"):
                tensor.uniform_(0.0, 2.7)
            elif name.endswith("dt_bias_H"):
                tensor.uniform_(-6.0, -2.0)
            elif tensor.dim() == 1:
                tensor.fill_(1.0)
            else:
                tensor.normal_(0.0, 0.02)
    return model.eval() if for_decoding else model.train()


def active_parameters(config: ModelConfig, values: dict[str, Any]) -> int:
    """Number of parameters that take part in a token's matrix products: the active experts, without the embedding."""
    from pipeline.config import model_size

    idle = values["num_experts"] - values["moe_top_k"]
    experts = values["pattern"].count("E") * idle * 2 * values["hidden_size"] * values["moe_ffn_size"]
    return model_size.num_parameters(values) - experts - values["vocab_size"] * values["hidden_size"]


def empty(device: torch.device) -> None:
    """Free the memory of an earlier model before the next one is measured."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def train(
    config: ModelConfig,
    values: dict[str, Any],
    parallel: Parallel,
    length: int,
    rate: float,
    recompute: bool,
    document: int = 0,
) -> tuple[str, float]:
    """Measure one LoRA step of `length` tokens. Returns its row of the table and its tokens per second.

    rate: floating-point operations per second of one large matrix product. document: tokens of each of the documents that are packed; 0: one
    sequence.
    """
    device = parallel.device
    empty(device)
    model = random_model(config, parallel, recompute)
    trainable = add_lora(model, LORA["rank"], 32, 0.0, TARGETS, seed=1)
    optimizer = torch.optim.AdamW(trainable, lr=1e-5)
    tokens = torch.randint(3, config.vocab_size, (1, length), device=device)
    whole, left = divmod(length, document) if document else (0, length)
    lengths = [document] * whole + [left] * bool(left)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (-token_log_probs(model, tokens, tokens, lengths).mean()).backward()
        optimizer.step()

    taken = seconds(device, step, repeats=3)
    recipe = {
        **{"method": "sft_lora", "optimizer": "adamw", "lora": LORA, "selection": {"choice": "last"}, "options": {}},
        **{"micro_batch_tokens": length, "batch_size": 1, "sequence_length": length},
    }
    layout, scan = {**ALONE, "recompute": "full" if recompute else "none"}, kernels.of(parallel.device).scan
    plan = footprint.training(values, layout, recipe, scan).peak
    peak = f"{torch.cuda.max_memory_allocated(device) / GIB:.2f}" if device.type == "cuda" else "-"
    share = 4 * active_parameters(config, values) * length / taken / rate
    row = f"{length:>8}{f' in {document}s' if document else '':<9}{length / taken:>12,.0f}{100 * share:>9.1f} %{peak:>10}{plan / GIB:>10.2f}"
    return row, length / taken


def decoding_rate(model: HybridModel, batch: int, num_new: int) -> float:
    """Tokens per second of greedy decoding. The first of two runs only warms up."""
    vocabulary = model.architecture.vocab_size
    prompts = [(str(n), torch.randint(3, vocabulary, (PROMPT_TOKENS,)).tolist()) for n in range(batch)]

    def run() -> int:
        return sum(len(one.ids) for one in decode(model, prompts, Decoding(num_new, batch), ()))

    run()
    began = time.perf_counter()
    written = run()
    return written / (time.perf_counter() - began)


def their_training_rate(config: ModelConfig, device: torch.device, length: int, recompute: bool) -> float:
    """Tokens per second of the same LoRA step by transformers and peft; nan if the memory does not suffice."""
    from bench import theirs

    tokens = torch.randint(3, config.vocab_size, (1, length), device=device)
    step = theirs.stepper(theirs.random_model(config, device, recompute), tokens, LORA["rank"], TARGETS)
    try:
        return length / seconds(device, step, repeats=3)
    except torch.OutOfMemoryError:
        return math.nan


def compare(config: ModelConfig, device: torch.device, ours: Rates, recompute: bool, num_new: int) -> None:
    """Measure the same lengths and batches with transformers and peft, and print a table with the ratios."""
    from bench import theirs

    print(f"\ntransformers, peft (nan: out of memory)\n{'':>8}{'tokens/s':>12}{'peak GiB':>10}{'ours is':>10}")
    for length, rate in ours["lengths"].items():
        empty(device)
        their_rate = their_training_rate(config, device, length, recompute)
        peak = f"{torch.cuda.max_memory_allocated(device) / GIB:.2f}" if device.type == "cuda" else "-"
        print(f"{length:>8}{their_rate:>12,.0f}{peak:>10}{rate / their_rate:>8.2f} x", flush=True)
    empty(device)
    model = theirs.random_model(config, device, recompute=False).eval()
    for batch, rate in ours["batches"].items():
        their_rate = theirs.decoding_rate(model, batch, PROMPT_TOKENS, num_new)
        print(f"{batch:>8}{their_rate:>12,.0f}{'':>10}{rate / their_rate:>8.2f} x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nemotron3_nano_30b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256, 512])
    parser.add_argument("--new", type=int, default=128, help="tokens that each sequence writes")
    parser.add_argument("--document", type=int, default=400, help="tokens of each document of the packed step")
    parser.add_argument("--no-recompute", action="store_true")
    parser.add_argument("--theirs", action="store_true", help="transformers and peft too, after ours is freed")
    arguments = parser.parse_args()
    values = yaml.safe_load((CONFIGS / f"{arguments.model}.yaml").read_text())
    config = ModelConfig.from_dict(values)
    parallel = start(ALONE)
    device = parallel.device
    kernels.tell(device)
    rate = matmul_rate(device, config.torch_dtype)
    print(f"torch {torch.__version__}, {config.dtype}; one matrix product: {rate / 1e12:.2f} TFLOP/s")
    for name, error in kernel_errors(device, config.torch_dtype).items():
        print(f"  {name:<16} {error:.1e} from float64")
    print(f"\nLoRA rank {LORA['rank']}, one sequence a step, {'no ' if arguments.no_recompute else ''}recompute")
    print(f"{'length':>8}{'':<9}{'tokens/s':>12}{'share':>11}{'peak GiB':>10}{'plan GiB':>10}")
    rates: Rates = {"lengths": {}, "batches": {}}
    for length in arguments.lengths:
        row, rates["lengths"][length] = train(config, values, parallel, length, rate, not arguments.no_recompute)
        print(row, flush=True)
    packed = train(
        config, values, parallel, max(arguments.lengths), rate, not arguments.no_recompute, arguments.document
    )
    print(packed[0], flush=True)
    empty(device)
    print(
        f"\ndecoding with an adapter, prompts of {PROMPT_TOKENS} tokens, {arguments.new} new\n{'batch':>8}{'tokens/s':>12}"
    )
    model = random_model(config, parallel, recompute=False, for_decoding=True)
    add_lora(model, LORA["rank"], 32, 0.0, TARGETS, seed=1)
    for batch in arguments.batches:
        rates["batches"][batch] = decoding_rate(model, batch, arguments.new)
        print(f"{batch:>8}{rates['batches'][batch]:>12,.0f}", flush=True)
    del model
    if arguments.theirs:
        compare(config, device, rates, not arguments.no_recompute, arguments.new)
    parallel.shutdown()


if __name__ == "__main__":
    main()
