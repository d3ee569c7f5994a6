"""Measure the time and memory of an audit by the number of rounds.

    python -m bench.audit [--rounds 4 8 20 40] [--items 2000]

Campaigns are made as in the tests (tests/support/sealed.py): eight arms, six families, an external target, and a constitution that allows
forty rounds. Each audit is `python -m pipeline audit` in a process of its own, by a copy of this code with that constitution, and hashes all
files of the campaign.
"""

import argparse
import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.campaign.constitution import Constitution
from tests.support import logs
from tests.support.sealed import RULES, SealedCampaign, gains

ROOT = Path(__file__).resolve().parent.parent
TEXT = b"a constitution of forty rounds\n"


def articles_of_forty() -> dict[str, Any]:
    articles = copy.deepcopy(RULES.articles)
    articles["4"] |= {"rounds": 40, "submissions": 200}
    return articles


def code(folder: Path) -> Path:
    """A copy of this code with the constitution of forty rounds."""
    for name in ("pipeline", "constitution"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "constitution" / "constitution.yaml").write_bytes(TEXT)
    (folder / "constitution" / "articles.json").write_text(json.dumps(articles_of_forty()))
    return folder


def campaign(items: int, key: Path) -> SealedCampaign:
    articles = articles_of_forty()
    rules = Constitution(hashlib.sha256(TEXT).hexdigest(), articles)
    return SealedCampaign(gains, levels=logs.LEVELS, num_items=items, campaign="bench", key=key, rules=rules, text=TEXT)


def audited(folder: Path, own: Path) -> tuple[float, float, float, bool]:
    """Audit a campaign by the code in `own`. Returns wall seconds, processor seconds, peak memory in MiB, and whether there were no findings."""
    out = folder.parent / "report.json"
    began = time.monotonic()
    with open(out, "w") as file:
        command = [sys.executable, "-P", "-m", "pipeline", "audit", str(folder), "--json"]
        process = subprocess.Popen(command, stdout=file, env={**os.environ, "PYTHONPATH": str(own)})
        _, _, used = os.wait4(process.pid, 0)
    return (
        time.monotonic() - began,
        used.ru_utime + used.ru_stime,
        used.ru_maxrss / 1024,
        json.loads(out.read_text())["ok"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, nargs="+", default=[4, 8, 20, 40])
    parser.add_argument("--items", type=int, default=2000)
    arguments = parser.parse_args()
    print("rounds  records  log MB  wall s  cpu s  s/round  MB  ok")
    with tempfile.TemporaryDirectory() as scratch:
        own = code(Path(scratch, "code"))
        grown = campaign(arguments.items, Path(scratch, "key"))
        for rounds in sorted(arguments.rounds):
            while len(grown.derived) < rounds:
                grown.play()
            folder = grown.write(Path(scratch, f"rounds-{rounds}"))
            size = (folder / "log.jsonl").stat().st_size / 1e6
            wall, cpu, most, ok = audited(folder, own)
            print(
                f"{rounds:6}  {len(grown.lines):7}  {size:6.1f}  {wall:6.1f}  {cpu:5.1f}  {cpu / rounds:7.2f}  {most:3.0f}  {ok}",
                flush=True,
            )


if __name__ == "__main__":
    main()
