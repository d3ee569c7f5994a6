"""Forecast the first round of the 30B as it was and as it is, with the rates of one H200, as the tables of docs/forecast.md.

    python -m bench.forecast

The rates are those of hydra_conf/cluster/slurm.yaml, measured on one H200. A row of the table is a set of overrides. The arithmetic is
pipeline/cluster/forecast.py's, which `plan-memory`, `doctor` and `round --dry-run` show too; only how the jobs share the site's GPUs is played
here.
"""

import heapq

from pipeline.campaign.records import NUM_ARMS
from pipeline.cluster import forecast
from pipeline.config import decoding, settings
from pipeline.config.settings import Settings

H200 = ["experiment=nano_30b", "cluster=slurm", "cluster.capacity.gpu_memory_gib=139"]
BEFORE = [
    *H200,
    "parallelism=tp4_ep8",
    "parallelism.judge_tp=4",
    "cluster.network=fabric",
    "tasks.decode_batch_size=64",
    "cluster.capacity.train_tokens_per_second=900",
    "cluster.capacity.decode_tokens_per_second={1:14,64:844,256:2906}",
]
AFTER = [*H200, "tasks.decode_batch_size=256"]
ROWS = {
    "before: 16 GPUs an arm, one padded row a pass, 64 slots": (BEFORE, 16),
    "two GPUs an arm, 64 slots": ([*H200, "tasks.decode_batch_size=64"], 16),
    "**after: two GPUs an arm, packed rows, 256 slots**": (AFTER, 16),
    "after, if a second GPU gained nothing": ([*AFTER, "cluster.capacity.scaling=0.5"], 16),
    "after, one GPU an arm, on one node": ([*AFTER, "parallelism=tp1"], 8),
    "after, one GPU an arm, **on one H200**": ([*AFTER, "parallelism=tp1"], 1),
}
"""What the row is -> (overrides, GPUs of the site)."""
BASE_ITEMS = 300
METHODS = ("sft_lora", "rft", "grpo")
SITES = {"two GPUs an arm": (AFTER, 16), "one H200": ([*AFTER, "parallelism=tp1"], 1)}


def wall_hours(chosen: Settings, expected: forecast.Forecast, gpus: int) -> float:
    """Hours of the first round on so many GPUs: arms in their order, then the reference, the base, and the reference's judging after it."""
    world = chosen.parallelism.world_size
    train = expected.train_hours_per_arm / world
    dev = (expected.first_hours / world - train) / 2
    free = [0.0] * max(1, gpus // world)
    ends = []
    for hours in [*[expected.wall_hours] * NUM_ARMS, train + dev, dev]:
        ends.append(heapq.heappop(free) + hours)
        heapq.heappush(free, ends[-1])
    reference = max(ends[NUM_ARMS], min(free)) + expected.reference_hours / chosen.devices_of("reference")
    return max(*ends, reference)


def with_small_base(chosen: Settings, expected: forecast.Forecast) -> float:
    """GPU-hours of the first round if the base answered BASE_ITEMS items in place of all of dev."""
    num_dev = len(chosen.tasks.families) * chosen.tasks.num_dev_per_family
    saved = decoding.assumed_decoding(chosen, num_dev) - decoding.assumed_decoding(chosen, BASE_ITEMS)
    return expected.first_round_hours - chosen.parallelism.world_size * saved / 3600


def table() -> str:
    """The table as Markdown."""
    lines = [
        f"| round | GPUs | training of an arm, GPU-hours | judging of an arm | later rounds | first round | base on {BASE_ITEMS} items "
        "| hours of the first |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (overrides, gpus) in ROWS.items():
        chosen = settings.compose(overrides)
        expected = forecast.forecast(chosen, NUM_ARMS)
        assert expected is not None
        numbers = [
            expected.train_hours_per_arm, expected.judge_hours_per_arm, expected.hours, expected.first_round_hours,
            with_small_base(chosen, expected), wall_hours(chosen, expected, gpus),
        ]  # fmt: skip
        lines.append(f"| {name} | {gpus} | {' | '.join(f'{number:.2f}' for number in numbers)} |")
    return "\n".join(lines)


def sampling_table() -> str:
    """What recipes that sample take beside sft_lora, as Markdown."""
    lines = [
        "| recipe | GPUs | completions drawn | drawing and scoring, GPU-hours an arm | training of an arm | later rounds | first round "
        "| hours of the first |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        for name, (overrides, gpus) in SITES.items():
            chosen = settings.compose([*overrides, f"recipe={method}"])
            expected = forecast.forecast(chosen, NUM_ARMS)
            assert expected is not None
            times, number = chosen.recipe.drawn
            drawn = f"{times} x {number:,}" if times else "none"
            hours = [
                expected.sample_hours_per_arm, expected.train_hours_per_arm, expected.hours, expected.first_round_hours,
                wall_hours(chosen, expected, gpus),
            ]  # fmt: skip
            lines.append(f"| `{method}`, {name} | {gpus} | {drawn} | {' | '.join(f'{each:.2f}' for each in hours)} |")
    return "\n".join(lines)


def arithmetic() -> str:
    """How the row of one H200 comes about, as lines of text."""
    chosen = settings.compose(ROWS["after, one GPU an arm, **on one H200**"][0])
    recipe, tasks, capacity = chosen.recipe, chosen.tasks, chosen.cluster.capacity
    expected = forecast.forecast(chosen, NUM_ARMS)
    assert expected is not None
    tokens = recipe.num_steps * recipe.batch_size * tasks.expected.row_tokens
    train = tokens / capacity.train_tokens_per_second
    items = len(tasks.families) * (tasks.num_dev_per_family + tasks.num_fresh_per_family)
    both, half = (decoding.assumed_decoding(chosen, number) for number in (items, items // 2))
    decoded = sum(decoding.expected_lengths(chosen, items))
    start, rates = capacity.start_seconds, capacity.decode_tokens_per_second
    steps = [1000 * decoding.step_seconds(busy, rates) for busy in (1, tasks.decode_batch_size)]
    return "\n".join(
        [
            f"training an arm      {recipe.num_steps} steps x {recipe.batch_size} rows x {tasks.expected.row_tokens:g} tokens = "
            f"{tokens / 1e6:.2f} M tokens",
            f"                     / {capacity.train_tokens_per_second:,.0f} a second = {train:,.0f} s, + {start:.0f} s of start",
            f"judging an arm       {items:,} items, {decoded / 1e3:,.0f} thousand tokens in {tasks.decode_batch_size} slots = "
            f"{both:,.0f} s, + {start:.0f} s",
            f"the longest alone    {tasks.max_new_tokens:,} steps of {steps[0]:.0f} to {steps[1]:.0f} ms",
            f"eight arms           8 x ({train + start:,.0f} + {both + start:,.0f}) s = "
            f"{8 * (round(train + start) + round(both + start)) / 3600:.2f} h",
            f"the reference        {train + start:,.0f} s of training, {half + start:,.0f} s of dev, {half + start:,.0f} s of fresh",
            f"the base             {half + start:,.0f} s of dev",
            f"together             {expected.first_round_hours:.2f} h; a later round, without the reference's training and the base, "
            f"{expected.hours:.2f} h",
        ]
    )


if __name__ == "__main__":
    print(table(), arithmetic(), sampling_table(), sep="\n\n")
