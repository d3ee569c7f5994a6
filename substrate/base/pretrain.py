"""Makes the tiny base model, in 20 minutes of one core.

    python -m substrate.base.pretrain --out substrate/base/model.safetensors

The base stands for a pretrained language model: it can read the chat form, copy, add, multiply, compare and look
things up, and knows none of the puzzles' rules. It is trained on these skills and nothing else:

    form       the families' sentences around meaningless letters and numbers; the answer is the operand, unchanged
    copy       repeats a span, or one of several                "Repeat 2: xk 407 b" -> "407"
    join       writes each piece on a line, then all in one     "Join: ab c" -> "ab\\nc\\nabc"
    places     writes each decimal place of a number on a line  "Places: 407" -> "400\\n7"
    product    number times one digit, digit by digit           "7.5 x 3" -> "5*3=15 7*3+1=22" -> "22.50"
    sum        two numbers, digit by digit                      "37 + 48" -> "7+8=15 3+4+1=8" -> "85"
    compare    the larger of two numbers                        "4.5 or 3.9" -> "4.5>3.9" -> "4.5"
    sequence   goes on through the alphabet or the digits       "After d e f" -> "g h i"
    table      looks up letters one by one                      "a=q b=f c=m; b c b" -> "bf cm bf" -> "fmf"

No example has a numeral beside its number, a factor to be found or a text to be deciphered. So the base answers no
puzzle, and what an adapter gains comes from `data/train.jsonl`. The same arguments give the same weights on the same
machine (one thread, fixed seed). The base that is shipped was made before rows were packed: its steps had the same rows,
but sums in another order, so it is not this program's result to the last bit.
"""

import random
import string
import sys
import time
from collections.abc import Callable
from pathlib import Path

from substrate.data.batches import Shape, Stream
from substrate.data.rows import Example, Plan, prepare
from substrate.interface.command_line import Parser
from substrate.interface.errors import exit_code_of
from substrate.tasks import roman, text_cipher, unit_conversion

SEED = 20251
NUM_STEPS, BATCH_SIZE = 3000, 64  # optimizer steps, sequences per step
MICRO_BATCH_TOKENS = 1024  # tokens per forward pass
SEQUENCE_LENGTH = 256  # most tokens of an example
PEAK, WARMUP_STEPS, MIN_LR_RATIO, WEIGHT_DECAY, CLIP_NORM = 4e-3, 200, 0.02, 0.02, 1.0
EXAMPLES_PER_SKILL = 40_000  # of each skill; some are seen more than once
REPORT_EVERY, SAVE_EVERY = 50, 500  # steps between printed lines, and between writes of the result so far

Draft = tuple[str, str, str]  # prompt, working, answer


def _form(rng: random.Random) -> Draft:
    """A family's sentences around random content; the answer is the operand itself, which is no puzzle's answer."""
    module = rng.choice((roman, unit_conversion, text_cipher))
    count = rng.randint(2, 3)
    if module is text_cipher:
        sides = [f"{_word(rng, 3, 5)} {_word(rng, 3, 5)}" for _ in range(2 * count + 1)]
    elif module is unit_conversion:
        sides = [f"{rng.randint(10, 99) / 10}" for _ in range(2 * count + 1)]
    else:
        sides = [str(rng.randint(1, 99)) if i % 2 == 0 else _word(rng, 1, 6).upper() for i in range(2 * count + 1)]
    *pairs, asked = sides
    lines = "\n".join(f"{left}{module.BECOMES}{right}" for left, right in zip(pairs[::2], pairs[1::2], strict=True))
    prompt = f"{module.HEADER}{lines}{module.QUESTION}{asked}{getattr(module, 'END', '')}"
    return prompt, asked, asked


def _copy(rng: random.Random) -> Draft:
    spans = [_span(rng) for _ in range(rng.randint(1, 5))]
    place = rng.randrange(len(spans))
    return f"Repeat {place + 1}: {' '.join(spans)}", spans[place], spans[place]


def _join(rng: random.Random) -> Draft:
    pieces = [_span(rng) for _ in range(rng.randint(2, 3))]
    joined = "".join(pieces)
    return f"Join: {' '.join(pieces)}", "\n".join([*pieces, joined]), joined


def _places(rng: random.Random) -> Draft:
    number = rng.randint(1, 10 ** rng.randint(1, 3) - 1)
    digits = str(number)
    places = [digit + "0" * (len(digits) - 1 - i) for i, digit in enumerate(digits) if digit != "0"]
    return f"Places: {number}", "\n".join(places), digits


def _product(rng: random.Random) -> Draft:
    number, factor = f"{rng.randint(1, 99) / 10}", rng.randint(2, 9)
    steps: list[str] = []
    carry = 0
    for digit in map(int, reversed(number.replace(".", ""))):
        steps.append(f"{digit}*{factor}{f'+{carry}' if steps else ''}={digit * factor + carry}")
        carry = (digit * factor + carry) // 10
    return f"{number} x {factor}", " ".join(steps), f"{float(number) * factor:.2f}"


def _sum(rng: random.Random) -> Draft:
    left, right = rng.randint(1, 99), rng.randint(1, 99)
    steps: list[str] = []
    carry = 0
    for one, other in zip(f"{left:02d}"[::-1], f"{right:02d}"[::-1], strict=True):
        total = int(one) + int(other) + carry
        steps.append(f"{one}+{other}{f'+{carry}' if steps else ''}={total}")
        carry = total // 10
    return f"{left} + {right}", " ".join(steps), str(left + right)


def _compare(rng: random.Random) -> Draft:
    left, right = (f"{rng.randint(1, 99) / 10}" for _ in range(2))
    sign = "=" if left == right else "><"[float(left) < float(right)]
    return f"{left} or {right}", f"{left}{sign}{right}", max(left, right, key=float)


def _sequence(rng: random.Random) -> Draft:
    symbols = rng.choice((string.ascii_lowercase, string.ascii_uppercase, string.digits))
    if rng.random() < 0.3:
        symbols = symbols[::-1]
    start = rng.randrange(len(symbols) - 5)
    shown, following = symbols[start : start + 3], symbols[start + 3 : start + 6]
    return f"After {' '.join(shown)}", " ".join(following), following


def _table(rng: random.Random) -> Draft:
    keys = rng.sample(string.ascii_lowercase, rng.randint(3, 9))
    values = dict(zip(keys, rng.sample(string.ascii_lowercase, len(keys)), strict=True))
    asked = [rng.choice(keys) for _ in range(rng.randint(2, 6))]
    entries = " ".join(f"{key}={value}" for key, value in values.items())
    pairs = " ".join(key + values[key] for key in asked)
    return f"{entries}; {' '.join(asked)}", pairs, "".join(values[key] for key in asked)


SKILLS: dict[str, Callable[[random.Random], Draft]] = {
    "form": _form,
    "copy": _copy,
    "join": _join,
    "places": _places,
    "product": _product,
    "sum": _sum,
    "compare": _compare,
    "sequence": _sequence,
    "table": _table,
}
MIX = {"form": 1, "copy": 2, "join": 1, "places": 1, "product": 3, "sum": 1, "compare": 1, "sequence": 1, "table": 3}


def examples(seed: int, count: int) -> list[Example]:
    """Returns `count` examples of every skill, which the seed determines."""
    drawn = []
    for skill, draw in SKILLS.items():
        rng = random.Random(f"{seed}/{skill}")
        for index in range(count):
            prompt, working, answer = draw(rng)
            traces = {"stepwise": working}
            drawn.append(Example(f"{skill}-{index:06d}", skill, prompt, answer, traces, "generated"))
    return drawn


def _word(rng: random.Random, shortest: int, longest: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(shortest, longest)))


def _span(rng: random.Random) -> str:
    alphabet = rng.choice((string.ascii_lowercase, string.ascii_uppercase, string.digits))
    return "".join(rng.choices(alphabet, k=rng.randint(1, 5)))


def pretrain(model_config: dict, out: Path, num_steps: int) -> None:
    """Trains all parameters from seeded initial weights, in this process alone, and writes the base checkpoint."""
    import torch

    from substrate.data.tokenizer import Tokenizer
    from substrate.distributed.groups import start
    from substrate.model import ModelConfig, build_model, init_weights, save_base, token_log_probs
    from substrate.training.schedule import learning_rates

    parallel = start({"tp": 1, "pp": 1, "ep": 1, "cp": 1, "dp": 1})
    encoder = Tokenizer.from_file(Path(__file__).parent / "tokenizer.json")
    plan = Plan(
        {name: float(share) for name, share in MIX.items()},
        real_share=0.0,
        epochs=0.0,
        curriculum="shuffled",
        holdout_per_family=0,
        sequence_length=SEQUENCE_LENGTH,
        num_places=num_steps * BATCH_SIZE,
        seed=SEED,
    )

    def encode(example: Example) -> tuple[list[int], list[int]]:
        return encoder.encode_prompt(example.prompt), encoder.encode_answer(example.traces["stepwise"], example.answer)

    rows = prepare(examples(SEED, EXAMPLES_PER_SKILL), encode, plan).rows
    stream = Stream(rows, BATCH_SIZE, Shape(MICRO_BATCH_TOKENS))
    model = build_model(ModelConfig.from_dict(model_config), parallel)
    init_weights(model, SEED)
    model.train()
    # Weight decay is for matrices, not for norms, biases and the vectors of the scan.
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.98))
    rates = learning_rates(
        "CosineAnnealing", peak=PEAK, num_steps=num_steps, warmup_steps=WARMUP_STEPS, min_lr_ratio=MIN_LR_RATIO
    )
    begun, recent = time.monotonic(), 0.0
    for step, batch in enumerate(stream):
        optimizer.zero_grad(set_to_none=True)
        for micro_batch in batch.micro_batches:
            log_probs_1L = token_log_probs(model, micro_batch.tokens_1L, micro_batch.labels_1L, micro_batch.lengths)
            loss = -(log_probs_1L * micro_batch.weights_1L).sum()
            loss.backward()
            recent += loss.item() / REPORT_EVERY
        parallel.finalize_gradients(model)
        parallel.clip_gradients(model, CLIP_NORM)
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.step()
        if (step + 1) % REPORT_EVERY == 0:
            print(f"step {step + 1}/{num_steps} loss {recent:.4f} {time.monotonic() - begun:.0f} s", flush=True)
            recent = 0.0
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == num_steps:
            save_base(model, out)
    parallel.shutdown()


def main() -> None:
    """Reads the command line and the tiny model's configuration, and trains."""
    import yaml

    parser = Parser(prog="substrate.base.pretrain", description="Make the tiny base model.")
    parser.add_argument("--model", type=Path, default=Path("hydra_conf/model/tiny.yaml"), help="model configuration")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS, help="optimizer steps; fewer for a quick try")
    arguments = parser.parse_args()
    pretrain(yaml.safe_load(arguments.model.read_text()), arguments.out, arguments.num_steps)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
