"""Compare our greedy decoding with transformers' `generate`: same weights and prompts, float32, one thread, in one process.

    python -m bench.generate [--model tiny] [--batches 1 16 64 128] [--new 64]     tokens per second and their ratio
    python -m bench.generate --parity 500 [--tp 2]                                 whether the tokens are the same

Speed: every sequence has a prompt of 64 tokens and writes `--new` tokens on both sides, whether or not an end of sequence comes. The table
shows medians of `--repeats` alternating runs. Parity: prompts of 1 to 100 tokens are decoded here at batch 1 and 64. Every token must be the
argmax of transformers' logits over prompt and completion; tokens whose logit is within 1e-4 of the best are counted as ties.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
import yaml  # noqa: E402

from substrate.distributed.groups import start  # noqa: E402
from substrate.distributed.launch import run_ranks  # noqa: E402
from substrate.inference.decode import Decoding, decode  # noqa: E402
from substrate.model import HybridModel, ModelConfig, build_model, init_weights, save_base  # noqa: E402

CONFIGS = Path(__file__).resolve().parent.parent / "hydra_conf" / "model"
PROMPT_TOKENS = 64
TIE = 1e-4


def both_models(config: ModelConfig, tp: int) -> tuple[HybridModel, transformers.PreTrainedModel]:
    """Our model over `tp` ranks and transformers' model, with the same random weights. Every rank has all of transformers' model."""
    parallel = start({"tp": tp, "pp": 1, "ep": 1, "cp": 1, "dp": 1})
    ours = build_model(config, parallel)
    init_weights(ours, seed=1)
    with tempfile.TemporaryDirectory() as own:
        folder = parallel.share(own)
        save_base(ours, folder)
        Path(folder, "config.json").write_text(json.dumps(config.to_transformers()))
        theirs = transformers.NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32)
        parallel.agree(True)  # keeps every rank from removing the folder while another reads it
    return ours.eval(), theirs.eval()


def our_tokens(model: HybridModel, prompts: torch.Tensor, num_new: int) -> list[list[int]]:
    named = [(str(number), prompt) for number, prompt in enumerate(prompts.tolist())]
    done = {one.item_id: one.ids for one in decode(model, named, Decoding(num_new, len(named)), ())}
    return [done[str(number)] for number in range(len(named))]


def their_tokens(model: transformers.PreTrainedModel, prompts: torch.Tensor, num_new: int) -> torch.Tensor:
    mask = torch.ones_like(prompts)
    how = {"do_sample": False, "max_new_tokens": num_new, "min_new_tokens": num_new, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(prompts, attention_mask=mask, **how)[:, prompts.shape[1] :]


def speed(ours: HybridModel, theirs: transformers.PreTrainedModel, arguments: argparse.Namespace) -> None:
    print(f"{'batch':>6}{'ours tok/s':>12}{'theirs tok/s':>14}{'ratio':>8}")
    for batch in arguments.batches:
        generator = torch.Generator().manual_seed(batch)
        prompts = torch.randint(3, ours.architecture.vocab_size, (batch, PROMPT_TOKENS), generator=generator)
        times: tuple[list[float], list[float]] = ([], [])
        num_written = [0, 0]
        for repeat in range(arguments.repeats + 1):  # the first is the warm-up
            for side, (run, model) in enumerate(((our_tokens, ours), (their_tokens, theirs))):
                begun = time.perf_counter()
                written = run(model, prompts, arguments.new)
                seconds = time.perf_counter() - begun
                if repeat:
                    times[side].append(seconds)
                num_written[side] = sum(len(row) for row in written)
        mine, foreign = (n / statistics.median(side) for n, side in zip(num_written, times, strict=True))
        print(f"{batch:>6}{mine:>12.0f}{foreign:>14.0f}{mine / foreign:>8.2f}", flush=True)


def parity(ours: HybridModel, theirs: transformers.PreTrainedModel, num_prompts: int, num_new: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (num_prompts,), generator=generator).tolist()
    vocabulary = ours.architecture.vocab_size
    prompts = [
        (str(n), torch.randint(3, vocabulary, (k,), generator=generator).tolist()) for n, k in enumerate(lengths)
    ]
    for batch in (1, 64):
        same = ties = wrong = 0
        for one in decode(ours, prompts, Decoding(num_new, batch), ()):
            with torch.no_grad():
                logits = theirs(torch.tensor([list(one.prompt) + one.ids]), use_cache=False).logits[0]
            logits = logits[len(one.prompt) - 1 : -1]
            best = logits.topk(2, -1).values
            for position, token in enumerate(one.ids):
                if token == int(logits[position].argmax()):
                    same += 1
                elif best[position, 0] - logits[position, token] < TIE:
                    ties += 1
                else:
                    wrong += 1
        if os.environ.get("RANK", "0") != "0":
            continue
        print(
            f"batch {batch}: {num_prompts} prompts, {same} tokens the same, {ties} at a tie, {wrong} wrong", flush=True
        )
        if wrong:
            raise SystemExit("some tokens differ from transformers'")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64, 128])
    parser.add_argument("--new", type=int, default=64, help="tokens that every sequence writes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parity", type=int, metavar="PROMPTS")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks, for --parity")
    arguments = parser.parse_args()
    if arguments.tp > 1 and "RANK" not in os.environ:
        os.environ["PYTHONPATH"] = str(CONFIGS.parent.parent)
        raise SystemExit(run_ranks("bench.generate", sys.argv[1:], arguments.tp))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = ModelConfig.from_dict(yaml.safe_load((CONFIGS / f"{arguments.model}.yaml").read_text()))
    ours, theirs = both_models(config, arguments.tp)
    if arguments.parity:
        parity(ours, theirs, arguments.parity, 16)
    else:
        speed(ours, theirs, arguments)


if __name__ == "__main__":
    main()
