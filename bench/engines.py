"""Decode the same new puzzles with native and with vLLM, as an arm is judged, and print how far the two agree (docs/engines.md).

    python -m bench.engines runs/nano --runtime /opt/vllm
    python -m bench.engines runs/nano --runtime /opt/vllm --items 20 --arm r0001/a3 --keep build/engines

The puzzles are new ones from a seed of this program, so nothing secret is read. Image, configuration and adapter are the campaign's; each engine
runs in the sandbox. Native decodes twice, the second time with half the slots: how far it agrees with itself shows what rounding alone does.
"""

import argparse
import hashlib
import sys
import tempfile
import time
from pathlib import Path

from pipeline.campaign.errors import ConfigError, PipelineError
from pipeline.campaign.facts import facts_of
from pipeline.campaign.layout import Campaign
from pipeline.config import decoding, settings
from pipeline.config.settings import Settings
from pipeline.execution import judge
from pipeline.sandbox import image, namespace
from substrate.inference import agreement

SEED = hashlib.sha256(b"bench.engines").hexdigest()
ENGINES = ("native", "native-half", "vllm")


def configurations(chosen: Settings, runtime: str, items: int) -> dict[str, Settings]:
    """Name -> the campaign's settings with another engine or other slots. Raises ConfigError where the runtime has no vLLM."""
    version = decoding.installed_vllm(runtime)
    if not version:
        raise ConfigError(f"{runtime} has no vLLM", "Valid: a virtual environment in which vLLM is installed")
    common, slots = [("tasks.num_dev_per_family", str(items))], chosen.tasks.decode_batch_size
    native = [*common, ("tasks.engine", "native"), ("tasks.engine_version", "")]
    vllm = [*common, ("tasks.engine", "vllm"), ("tasks.engine_version", version), ("cluster.vllm_runtime", runtime)]
    every = [native, [*native, ("tasks.decode_batch_size", str(max(1, slots // 2)))], vllm]
    return {name: settings.with_overrides(chosen, words) for name, words in zip(ENGINES, every, strict=True)}


def decode(campaign: Campaign, arm: str, runtime: str, items: int, out: Path) -> Path:
    """Decode with each engine into `out`, one file each. Returns answers.jsonl there."""
    round_name, _, arm_name = arm.partition("/")
    folder = campaign.round(round_name)
    every = configurations(settings.load(folder.config), runtime, items)
    adapters = [each.adapter_dir for each in folder.attempts(arm_name) if each.adapter_dir.exists()]
    if not adapters:
        raise ConfigError(
            f"{arm} of {campaign.folder} has no adapter", "Valid: an arm that was trained, such as r0000/a0"
        )
    with namespace.scratch_folder(None, "engines-") as scratch:
        with image.mounted(campaign.image, facts_of(campaign)["image"]["tree_digest"], scratch) as mount:
            log = out / "judge.log"
            made = judge.make_items(mount.root, every["native"], "dev", SEED, scratch / "items", log)
            (out / "answers.jsonl").write_bytes((made / "answers.jsonl").read_bytes())
            for name, chosen in every.items():
                began = time.monotonic()
                judged = judge.judge(mount.root, chosen, adapters[-1], {}, scratch, log, item_folders={"dev": made})
                (out / f"{name}.jsonl").write_bytes(judged.raw["dev"])
                print(f"{name}: {judged.engine}, {time.monotonic() - began:.0f} s", flush=True)
    return out / "answers.jsonl"


def main() -> int:
    """Read the command line, decode and print. Returns the exit code: 2 for a campaign, an arm or a runtime that is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", type=Path, help="a campaign with a trained adapter")
    parser.add_argument("--runtime", required=True, help="virtual environment with vLLM")
    parser.add_argument("--items", type=int, default=100, help="puzzles of each family; the default is 100")
    parser.add_argument("--arm", default="r0000/a0", help="whose adapter; the default is the reference")
    parser.add_argument("--keep", type=Path, help="a folder that gets the completions and the log")
    arguments = parser.parse_args()
    namespace.enter_private_namespace([sys.executable, "-m", "bench.engines", *sys.argv[1:]])
    try:
        with tempfile.TemporaryDirectory() as folder:
            out = arguments.keep or Path(folder)
            out.mkdir(parents=True, exist_ok=True)
            campaign = Campaign.at(arguments.campaign)
            answers = decode(campaign, arguments.arm, arguments.runtime, arguments.items, out)
            for other in ENGINES[1:]:
                lines = agreement.compare(out / "native.jsonl", out / f"{other}.jsonl", answers)
                print(f"\nA native, B {other}", *lines, sep="\n")
    except PipelineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
