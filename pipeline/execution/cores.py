"""On which cores this process may run, and whether these are as many as its job asks for.

srun binds a task to cores (its affinity), and a cgroup may limit the time that all of them give (a quota, as containers have it).
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.settings import Settings

CGROUPS = Path("/sys/fs/cgroup")


def cores(chosen: Settings) -> dict[str, Any]:
    """The number of cores that this process may use, their list, and those that its job asks for (0 outside of a Slurm job).

    It is for the claim, the result and `status`. Prints the list, as a warning if the cores are fewer: each rank then waits for the others,
    and the arm takes many times as long.
    """
    asked = chosen.cluster.cpus_per_task if chosen.cluster.kind == "slurm" and os.environ.get("SLURM_JOB_ID") else 0
    usable = sorted(os.sched_getaffinity(0))
    limit = quota()
    number = len(usable) if limit is None else min(len(usable), max(1, int(limit)))
    listed = ranges(usable)
    by_quota = f", and its cgroup gives the time of {limit:g}" if limit is not None and limit < len(usable) else ""
    if number < asked:
        print(
            f"warning: this task may run on {number} of the {asked} cores that cluster.cpus_per_task asks for on "
            f"{platform.node()} (cores {listed}{by_quota}). From Slurm 22.05 on srun takes that number from SRUN_CPUS_PER_TASK; a plain sbatch "
            f"takes it from --cpus-per-task={asked}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    elif asked:
        print(f"this task has the cores {listed} of {platform.node()}{by_quota}", file=sys.stderr, flush=True)
    return {"cores": number, "cores_asked": asked, "core_list": listed}


def quota(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """The cores whose time the process's cgroup and those above it allow, the least of them; None where none has a limit."""
    limits = []
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = root / ("cpu" if controllers else "") / path.lstrip("/")
        for each in (folder, *folder.parents):
            if not each.is_relative_to(root):
                break
            if (file := each / "cpu.max").exists():
                most, period = file.read_text().split()
            elif (file := each / "cpu.cfs_quota_us").exists():
                most, period = file.read_text().strip(), (each / "cpu.cfs_period_us").read_text()
            else:
                continue
            if most not in ("max", "-1"):
                limits.append(int(most) / int(period))
    return min(limits, default=None)


def ranges(numbers: Sequence[int]) -> str:
    """A sorted list of numbers in Slurm's form, such as 0-3,8."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ",".join(str(each[0]) if len(each) == 1 else f"{each[0]}-{each[-1]}" for each in groups)
