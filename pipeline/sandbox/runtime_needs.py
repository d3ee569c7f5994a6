"""What the Python that trains and judges must have, in `.venv` or in a site's container (cluster.runtime). Standard library only.

    $RUNTIME pipeline/sandbox/runtime_needs.py
    Python 3.12.3: torch 2.9.0, ...; /usr/bin/gcc compiles kernels; mamba-ssm 2.3.2, whose Triton kernel runs the scan on a GPU if it can be
    imported there

A runtime is asked for packages and for versions that the code rests on, never for those of constraints.txt, with which the tests ran. No
package is imported, because torch alone takes seconds. On a node the file itself is run, so it imports nothing of this project.
"""

import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from typing import NamedTuple

FIRST_PYTHON, LAST_PYTHON = (
    (3, 11),
    (3, 13),
)  # 3.11: tomllib, typing.Self. Versions after the last have not been looked at
CURE = "docs/containers.md has the lines that install what a PyTorch or NeMo container lacks"
SCAN = "mamba_ssm"
"""The package whose Triton kernel runs Mamba's scan on a GPU. Without it the scan is plain torch: right, and slower (substrate/ops/kernels.py)."""
NO_COMPILER = "on a GPU nothing is compiled, because"
"""Begins the sentence of a node where Triton cannot compile, with which mamba-ssm's kernels and torch's compiler run (substrate/ops/kernels.py)."""
PLAIN_SCAN = "on a GPU Mamba's scan runs in plain torch, because mamba-ssm is missing"


class Need(NamedTuple):
    """A distribution, by the name that pip knows."""

    name: str
    least: str  # the lowest version that has what is used, or "" where any has
    why: str


NEEDS = (
    Need("torch", "2.6", "trains and decodes; megatron-core 0.16 asks for it"),
    Need("megatron-core", "0.16", "the model's layers and process groups, by the names that 0.16.1 and 0.19.2 have"),
    Need("nemo-toolkit", "2.0", "the learning rate's schedule and the optimizer adan"),
    Need("safetensors", "", "weights, adapters and checkpoints"),
    Need("tokenizers", "", "the tokenizer"),
    Need("numpy", "", "torch's and h5py's arrays"),
    Need("cryptography", "", "the log's signatures"),
    Need("h5py", "3.0", "result files; strings are read by its interface since 3.0"),
    Need("hydra-core", "1.3", "configurations are composed by the rules of 1.3"),
    Need("omegaconf", "2.3", "typed configurations"),
    Need("PyYAML", "", "frozen configurations"),
)


def lacking() -> list[str]:
    """Return what this Python lacks, each as "h5py 3.0 or newer (result files; ...)", with the version found where it is too old."""
    missing = []
    if not FIRST_PYTHON <= sys.version_info[:2]:
        missing.append(f"Python {'.'.join(map(str, FIRST_PYTHON))} or newer")
    for need in NEEDS:
        found = version(need.name)
        if found is None or numbers(found) < numbers(need.least):
            wanted = f"{need.name} {need.least} or newer" if need.least else need.name
            missing.append(f"{wanted} ({need.why}{'' if found is None else f'; it is {found}'})")
    return missing


def version(name: str) -> str | None:
    """Return the version of an installed distribution, or None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: 2.9.0a0+145a3a7bda.nv25.10 is (2, 9, 0)."""
    leading = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, leading.group().split("."))) if leading else ()


def describe() -> str:
    """Return one line: the Python, and what it has, or what it lacks; at last what compiles, and how Mamba's scan will run on a GPU."""
    python = f"Python {platform.python_version()}"
    if missing := lacking():
        return f"{python} lacks {', '.join(missing)}"
    newer = " (newer than any that was looked at)" if sys.version_info[:2] > LAST_PYTHON else ""
    has = ", ".join(f"{need.name} {version(need.name)}" for need in NEEDS)
    return f"{python}{newer}: {has}; {compiler()}; {scan()}"


@functools.cache
def compiler() -> str:
    """Return which C compiler Triton would compile its launchers with, or why there is none. They include Python.h."""
    program = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not program:
        return f"{NO_COMPILER} there is no C compiler (CC, gcc or clang)"
    headers = sysconfig.get_paths()["include"]
    command = [*program.split(), f"-I{headers}", "-fsyntax-only", "-x", "c", "-"]
    try:
        done = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{NO_COMPILER} {program} does not run: {error}"
    return (
        f"{NO_COMPILER} {program} does not find Python.h in {headers}"
        if done.returncode
        else f"{program} compiles kernels"
    )


def scan() -> str:
    """Return how Mamba's scan will run on a GPU. Only a GPU's own process knows whether a package that is found can be imported."""
    if importlib.util.find_spec(SCAN) is None:
        return PLAIN_SCAN
    return f"mamba-ssm {version('mamba-ssm') or 'of an unknown version'}, whose Triton kernel runs the scan on a GPU if it can be imported there"


if __name__ == "__main__":
    print(describe())
    if lacking():
        sys.exit(f"cure: {CURE}")
