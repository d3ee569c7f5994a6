"""Measure everything that needs a GPU in one run: errors of kernels against float64, and speed and memory of LoRA steps and decoding.

    python -m bench.gpu                                        the 30B with random bf16 weights on one GPU
    python -m bench.gpu --model small --lengths 256 512 --batches 1 8 --new 16       the same code on any machine, in a minute
    python -m bench.gpu --theirs                               measures transformers with peft too, and prints the ratios
    python -m bench.gpu --profile FOLDER                       also writes there which kernels a step and a token consist of

Speeds are medians. `share` is the rate of the model's useful matrix products divided by the rate of one large matrix product, measured in
the same run. A token costs 2 x active parameters forward, and as many again for the gradient of the inputs; recomputation is not counted.
`plan` is the peak memory that pipeline/config/footprint.py predicts, and `peak` is the allocator's, which a CPU does not have. A part that
fails is told with its error, the others go on, and the command ends with code 1.
"""

import argparse
import functools
import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import yaml  # noqa: E402

from bench.device import empty, failed, kernel_errors, matmul_rate, part, peak_of, profiled, seconds  # noqa: E402
from pipeline.config import footprint, model_size  # noqa: E402
from substrate.distributed.groups import Parallel, start  # noqa: E402
from substrate.inference import decode as decoding  # noqa: E402
from substrate.inference.decode import Decoding, decode  # noqa: E402
from substrate.inference.steps import Steps  # noqa: E402
from substrate.model import HybridModel, ModelConfig, add_lora, build_model, token_log_probs  # noqa: E402
from substrate.model.hybrid import RECOMPUTE, set_recompute  # noqa: E402
from substrate.ops import kernels  # noqa: E402

CONFIGS = Path(__file__).resolve().parent.parent / "hydra_conf" / "model"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "shared_experts.up_proj", "shared_experts.down_proj"]
LORA = {"rank": 32, "targets": TARGETS}
ALONE = {"tp": 1, "pp": 1, "ep": 1, "cp": 1, "dp": 1}
PROMPT_TOKENS = 64
THEIR_TOKENS = 32  # that transformers writes in each sequence: its rate after the prompts does not depend on how many
GIB = 2**30


def random_model(config: ModelConfig, parallel: Parallel) -> HybridModel:
    """A model with random weights, made on the device, so that nobody has to read 63 GB."""
    model = build_model(config, parallel)
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
    return model


def active_parameters(config: ModelConfig, values: dict[str, Any]) -> int:
    """Number of parameters that take part in a token's matrix products: the active experts, without the embedding."""
    idle = values["num_experts"] - values["moe_top_k"]
    experts = values["pattern"].count("E") * idle * 2 * values["hidden_size"] * values["moe_ffn_size"]
    return model_size.num_parameters(values) - experts - values["vocab_size"] * values["hidden_size"]


def lora_step(
    model: HybridModel, trainable: Sequence[torch.nn.Parameter], length: int, document: int
) -> Callable[[], None]:
    """A function that does one LoRA step of one sequence, or of packed documents of `document` tokens each."""
    optimizer = torch.optim.AdamW(trainable, lr=1e-5)
    tokens = torch.randint(3, model.architecture.vocab_size, (1, length), device=trainable[0].device)
    whole, left = divmod(length, document) if document else (0, length)
    lengths = [document] * whole + [left] * bool(left)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (-token_log_probs(model, tokens, tokens, lengths).mean()).backward()
        optimizer.step()

    return step


def train(
    model: HybridModel, trainable: Sequence[torch.nn.Parameter], values: dict[str, Any], length: int, rate: float, modes: Sequence[str],
    document: int = 0, profile: Path | None = None,
) -> float:  # fmt: skip
    """Measure LoRA steps of `length` tokens and print their row. Returns tokens per second.

    rate: floating-point operations per second of one large matrix product. modes: what is recomputed; the first that memory suffices for.
    """
    device, config = trainable[0].device, model.architecture
    for mode in modes:
        model.zero_grad(set_to_none=True)
        empty(device)
        set_recompute(model.train(), mode)
        step = lora_step(model, trainable, length, document)
        try:
            taken = seconds(device, step, repeats=3)
        except torch.OutOfMemoryError:
            if mode == modes[-1]:
                raise
            continue
        break
    recipe = {
        **{"method": "sft_lora", "optimizer": "adamw", "lora": LORA, "selection": {"choice": "last"}, "options": {}},
        **{"micro_batch_tokens": length, "batch_size": 1, "sequence_length": length},
    }
    plan = footprint.training(values, {**ALONE, "recompute": mode}, recipe, kernels.of(device).scan).peak
    share = 4 * active_parameters(config, values) * length / taken / rate
    what = f"{length:>8}{f' in {document}s' if document else '':<9}{mode:<11}"
    print(f"{what}{length / taken:>12,.0f}{100 * share:>9.1f} %{peak_of(device):>10}{plan / GIB:>10.2f}", flush=True)
    if profile is not None:
        profiled(profile, device, step)
    return length / taken


def decoding_rate(model: HybridModel, batch: int, num_new: int) -> tuple[float, float]:
    """Tokens per second of greedy decoding: (of the second half of the tokens, of the whole with prompts and recording).

    The first of two runs only warms up.
    """
    vocabulary, moments = model.architecture.vocab_size, {}
    prompts = [(str(n), torch.randint(3, vocabulary, (PROMPT_TOKENS,)).tolist()) for n in range(batch)]

    def note(ids: list[int]) -> bool:
        moments.setdefault(len(ids), time.perf_counter())
        return False

    for _ in range(2):
        moments.clear()
        began = time.perf_counter()
        for _completion in decode(model, prompts, Decoding(num_new, batch), (), note):
            pass
        ended = time.perf_counter()
    half = num_new // 2
    return batch * (num_new - half) / (moments[num_new] - moments[half]), batch * num_new / (ended - began)


def agreement(model: HybridModel, batch: int = 8, num_new: int = 32) -> float:
    """Share of the tokens that eager steps write and recorded ones too, up to the first difference of each sequence."""
    prompts = [
        (str(n), torch.randint(3, model.architecture.vocab_size, (PROMPT_TOKENS + n,)).tolist()) for n in range(batch)
    ]
    written = []
    for use_graphs in (None, False):
        with mock.patch.object(decoding, "Steps", lambda *given, how=use_graphs, **_: Steps(*given, use_graphs=how)):
            written.append({one.item_id: one.ids for one in decode(model, prompts, Decoding(num_new, batch), ())})
    same = [
        sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(written[0][name], ids, strict=True)))
        for name, ids in written[1].items()
    ]
    return sum(same) / (batch * num_new)


def train_all(
    model: HybridModel, trainable: Sequence[torch.nn.Parameter], values: dict[str, Any], rate: float, modes: Sequence[str],
    arguments: argparse.Namespace,
) -> dict[int, float]:  # fmt: skip
    """Print the table of LoRA steps. Returns the tokens per second of each length of one sequence."""
    print(f"{'length':>8}{'':<9}{'recompute':<11}{'tokens/s':>12}{'share':>11}{'peak GiB':>10}{'plan GiB':>10}")
    steps = {}
    rows = [(length, 0) for length in arguments.lengths]
    if arguments.lengths and arguments.document:
        rows.append((max(arguments.lengths), arguments.document))
    for length, document in rows:
        name = f"packed_{length}" if document else f"step_{length}"
        profile = arguments.profile / f"{name}.txt" if arguments.profile else None
        with part(name):
            tokens_per_second = train(model, trainable, values, length, rate, modes, document, profile)
            if not document:
                steps[length] = tokens_per_second
    return steps


def decode_all(model: HybridModel, arguments: argparse.Namespace) -> dict[int, float]:
    """Print the table of decoding. Returns the tokens per second of each batch, without prompts and recording."""
    print(f"{'batch':>8}{'tokens/s':>12}{'whole':>12}{'peak GiB':>10}")
    device, batches = model.embedding.word_embeddings.weight.device, {}
    with part("agreement"):
        print(f"{100 * agreement(model):.1f} % of the tokens of eager steps are those of recorded ones", flush=True)
    for batch in arguments.batches:
        with part(f"decode_{batch}"):
            empty(device)
            batches[batch], whole = decoding_rate(model, batch, arguments.new)
            print(f"{batch:>8}{batches[batch]:>12,.0f}{whole:>12,.0f}{peak_of(device):>10}", flush=True)
    for batch in arguments.batches if arguments.profile else ():
        with part(f"profile of decode_{batch}"):
            profiled(
                arguments.profile / f"decode_{batch}.txt", device, functools.partial(decoding_rate, model, batch, 8)
            )
    return batches


def compare(
    config: ModelConfig, device: torch.device, steps: dict[int, float], batches: dict[int, float], modes: Sequence[str]
) -> None:
    """Measure the same lengths and batches with transformers and peft, and print a table with the ratios."""
    from bench import theirs

    print(f"\ntransformers, peft\n{'':>28}{'tokens/s':>12}{'peak GiB':>10}{'ours is':>10}")
    for (length, rate), mode in itertools.product(steps.items(), dict.fromkeys((modes[0], "full"))):
        with part(f"{length} {mode}"):
            empty(device)
            tokens = torch.randint(3, config.vocab_size, (1, length), device=device)
            model = theirs.random_model(config, device, recompute=mode == "full")
            try:
                their_rate = length / seconds(device, theirs.stepper(model, tokens, LORA["rank"], TARGETS), repeats=3)
            except torch.OutOfMemoryError:
                their_rate = math.nan  # it does not fit
            del model
            print(
                f"{length:>8}{'':<9}{mode:<11}{their_rate:>12,.0f}{peak_of(device):>10}{rate / their_rate:>8.2f} x",
                flush=True,
            )
    with part("decoding"):
        empty(device)
        model = theirs.random_model(config, device, recompute=False).eval()
        for batch, rate in batches.items():
            their_rate = theirs.decoding_rate(model, batch, PROMPT_TOKENS, THEIR_TOKENS)
            print(f"{batch:>8}{'':<20}{their_rate:>12,.0f}{'':>10}{rate / their_rate:>8.2f} x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nemotron3_nano_30b")
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64, 256, 512])
    parser.add_argument("--new", type=int, default=256, help="tokens that each sequence writes")
    parser.add_argument("--document", type=int, default=400, help="tokens of each document of the packed step")
    parser.add_argument("--recompute", choices=RECOMPUTE, help="by default the first of these that memory suffices for")
    parser.add_argument("--theirs", action="store_true", help="transformers and peft too, after ours is freed")
    parser.add_argument("--profile", type=Path, help="folder for the kernels of a step and of decoding")
    arguments = parser.parse_args()
    values = yaml.safe_load((CONFIGS / f"{arguments.model}.yaml").read_text())
    config = ModelConfig.from_dict(values)
    parallel = start(ALONE)
    device, began = parallel.device, time.monotonic()
    modes = [arguments.recompute] if arguments.recompute else list(RECOMPUTE)
    kernels.tell(device)
    rate = matmul_rate(device, config.torch_dtype)
    print(f"torch {torch.__version__}, {config.dtype}; one matrix product: {rate / 1e12:.2f} TFLOP/s")
    with part("kernels"):
        for name, error in kernel_errors(device, config.torch_dtype).items():
            print(f"  {name:<16} {error:.1e} from float64")
    model = random_model(config, parallel)
    trainable = add_lora(model, LORA["rank"], 32, 0.0, TARGETS, seed=1)
    print(f"\nLoRA rank {LORA['rank']}, one row a step")
    steps = train_all(model, trainable, values, rate, modes, arguments)
    model.zero_grad(set_to_none=True)
    print(f"\ndecoding with an adapter, prompts of {PROMPT_TOKENS} tokens, {arguments.new} new")
    batches = decode_all(model.eval(), arguments)
    del model, trainable
    if arguments.theirs:
        compare(config, device, steps, batches, modes)
    print(f"\nall of it took {time.monotonic() - began:.0f} s" + (f"; failed: {', '.join(failed)}" if failed else ""))
    parallel.shutdown()
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
