"""Test what a runtime must have: versions of containers are read, a lack is named, and no pin of ours is asked for."""

import ast
import importlib.metadata
import subprocess
import sys

import pytest

from pipeline.campaign.errors import NotFound
from pipeline.cluster import doctor
from pipeline.sandbox import runtime_needs
from tests.support.paths import ROOT


def _with(monkeypatch, **versions: str | None) -> None:
    """Makes the named distributions have these versions, or be absent."""
    installed = importlib.metadata.version

    def version(name: str) -> str:
        found = versions[name] if name in versions else installed(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize("python", [(3, 11), (3, 12), (3, 13)])
def test_a_container_with_other_versions_will_do(monkeypatch, python):
    """NVIDIA's torch has a version of its own, and numpy and h5py are not ours."""
    monkeypatch.setattr(sys, "version_info", (*python, 3, "final", 0))
    _with(monkeypatch, torch="2.9.0a0+145a3a7bda.nv25.10", numpy="1.26.4", h5py="3.10", **{"megatron-core": "0.19.2"})
    assert runtime_needs.lacking() == []
    assert "torch 2.9.0a0+145a3a7bda.nv25.10, megatron-core 0.19.2" in runtime_needs.describe()


def test_what_is_absent_or_too_old_is_named_with_its_reason(monkeypatch):
    _with(monkeypatch, h5py=None, torch="2.4.1")
    torch, h5py = runtime_needs.lacking()
    assert torch == "torch 2.6 or newer (trains and decodes; megatron-core 0.16 asks for it; it is 2.4.1)"
    assert h5py.startswith("h5py 3.0 or newer (result files")
    assert " lacks torch 2.6 or newer (" in runtime_needs.describe()
    monkeypatch.setattr(sys, "version_info", (3, 10, 12, "final", 0))
    assert runtime_needs.lacking()[0] == "Python 3.11 or newer"


def test_a_newer_python_is_told_and_not_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    assert runtime_needs.lacking() == [] and "newer than any that was looked at" in runtime_needs.describe()


def test_a_node_runs_the_file_alone():
    done = subprocess.run([sys.executable, "-I", runtime_needs.__file__], capture_output=True, text=True, check=True)
    assert done.stdout == runtime_needs.describe() + "\n" and done.stdout.startswith("Python 3")


def test_a_python_that_lacks_something_ends_with_a_code_and_the_cure(tmp_path):
    done = subprocess.run([sys.executable, "-I", "-S", runtime_needs.__file__], capture_output=True, text=True)
    assert done.returncode == 1 and " lacks torch 2.6 or newer (" in done.stdout
    assert done.stderr == f"cure: {runtime_needs.CURE}\n"


@pytest.mark.parametrize("is_there", [True, False])
def test_how_the_scan_will_run_is_told(tmp_path, monkeypatch, is_there):
    """By whether the package is found; metadata would miss one whose files are merely on the path."""
    if is_there:
        (tmp_path / "mamba_ssm").mkdir()
        (tmp_path / "mamba_ssm" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    told = runtime_needs.describe().rpartition("; ")[2]
    assert told == runtime_needs.scan() and (told == runtime_needs.PLAIN_SCAN) != is_there


def test_what_compiles_kernels_is_told(monkeypatch):
    """A program that is there and does not run, one that does, and one that finds no Python.h."""
    for program, begins in (
        ("/absent/cc", f"{runtime_needs.NO_COMPILER} /absent/cc does not run"),
        ("true", "true compiles kernels"),
        ("false", f"{runtime_needs.NO_COMPILER} false does not find Python.h in /"),
    ):
        monkeypatch.setenv("CC", program)
        runtime_needs.compiler.cache_clear()
        told = runtime_needs.describe().split("; ")[-2]
        assert told == runtime_needs.compiler() and told.startswith(begins)
    runtime_needs.compiler.cache_clear()


def test_a_worker_ends_before_it_claims_an_attempt(monkeypatch):
    from pipeline.execution.worker import work

    _with(monkeypatch, safetensors=None)
    with pytest.raises(NotFound, match=r"lacks safetensors \(weights, adapters and checkpoints\).*docs/containers.md"):
        work(None, None, "a0")  # type: ignore[arg-type]  # nothing of the campaign is looked at


def test_no_code_is_newer_than_the_first_python():
    """All of it is parsed with the grammar of the oldest Python that is offered."""
    files = [path for name in ("pipeline", "substrate", "slurm") for path in (ROOT / name).rglob("*.py")]
    assert len(files) > 200
    for path in files:
        ast.parse(path.read_text(), feature_version=runtime_needs.FIRST_PYTHON)


def test_a_container_s_recipe_brings_what_is_needed_and_neither_torch_nor_cuda():
    folder = ROOT / "slurm" / "runtime"
    lines = (
        line for line in (folder / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")
    )
    named = {line.partition("==")[0].lower() for line in lines}
    assert {need.name.lower() for need in runtime_needs.NEEDS} - named == {"torch", "numpy"}  # the container has them
    assert not [name for name in named if name.startswith(("torch=", "nvidia", "cuda", "triton"))]
    for recipe in ("Dockerfile", "runtime.def"):
        text = (folder / recipe).read_text()
        assert all(f" {package}" in text for package in {*doctor.PROGRAMS.values(), *doctor.USER_PROGRAMS.values()}), (
            recipe
        )
