"""Test the store of compiled kernels: filled once, complete or absent, verified at each use, out of reach of what a sandbox gets."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.campaign.errors import Interrupted, TrialFailed
from pipeline.campaign.files import tree_digest
from pipeline.config import settings
from pipeline.execution import image_process, multinode
from pipeline.sandbox import devices, image, kernel_cache
from pipeline.sandbox.kernel_cache import Kernels
from tests.support.paths import ROOT

KEY = "0123456789abcdef-nvidia-h200-5b1e0001"
WORKER = """
import sys, time
from pathlib import Path
from pipeline.sandbox import kernel_cache
place = Path(sys.argv[1])
def fill():
    with open(place / "filled", "a") as file:
        file.write("x")
    made = place / f"made-{sys.argv[2]}"
    (made / "triton").mkdir(parents=True)
    (made / "triton/kernel.so").write_text("code")
    time.sleep(0.5)
    return made, {"kernels": "scan triton"}
found = kernel_cache.obtain(str(place), sys.argv[3], place / f"copy-{sys.argv[2]}", fill)
print(found.digest)
"""


def fill_with(folder: Path, text: str = "code", calls: list[str] | None = None) -> Any:
    def fill() -> tuple[Path, dict[str, str]]:
        if calls is not None:
            calls.append(text)
        made = folder / f"made-{len(list(folder.glob('made-*')))}"
        (made / "inductor" / "ab").mkdir(parents=True)
        (made / "inductor" / "ab" / "kernel.so").write_text(text)
        (made / "inductor" / "latest").symlink_to("ab/kernel.so")
        return made, {"kernels": "elementwise compiled"}

    return fill


def store(place: Path) -> Path:
    return kernel_cache.store_of(str(place))


def test_workers_of_a_node_fill_it_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    workers = [
        subprocess.Popen(
            [*command, str(number), KEY], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for number in range(3)
    ]
    ended = [worker.communicate(timeout=60) for worker in workers]
    assert (tmp_path / "filled").read_text() == "x"
    assert {out.strip() for out, _ in ended} == {tree_digest(store(tmp_path) / KEY / "tree")}
    told = [err for _, err in ended]
    assert sum("compiling and tuning" in err for err in told) == 1
    assert sum("another worker fills" in err for err in told) == 2
    assert stat.S_IMODE(store(tmp_path).parent.stat().st_mode) == 0o700


def test_a_complete_cache_is_copied_and_its_digest_told(tmp_path: Path) -> None:
    calls: list[str] = []
    first = kernel_cache.obtain(str(tmp_path), KEY, tmp_path / "a", fill_with(tmp_path, calls=calls))
    again = kernel_cache.obtain(str(tmp_path), KEY, tmp_path / "b", fill_with(tmp_path, "other", calls))
    assert calls == ["code"]
    assert again.digest == first.digest == tree_digest(tmp_path / "b")
    assert again.said.startswith(f"{first.digest[:16]} (elementwise compiled), made in ")
    record = json.loads((store(tmp_path) / KEY / "cache.json").read_text())
    assert (record["schema"], record["digest"]) == (1, first.digest)


@pytest.mark.parametrize("damage", ["changed", "added", "record", "link"])
def test_a_damaged_cache_is_set_aside_and_made_anew(tmp_path: Path, damage: str, capsys: Any) -> None:
    kernel_cache.obtain(str(tmp_path), KEY, tmp_path / "a", fill_with(tmp_path, "first"))
    cache = store(tmp_path) / KEY
    code = cache / "tree/inductor/ab/kernel.so"
    if damage == "changed":
        code.write_text("evil")
    elif damage == "added":
        (cache / "tree/more.py").write_text("evil")
    elif damage == "link":
        code.unlink()
        code.symlink_to("/etc/passwd")
    else:
        (cache / "cache.json").write_text("{")
    capsys.readouterr()
    found = kernel_cache.obtain(str(tmp_path), KEY, tmp_path / "b", fill_with(tmp_path, "second"))
    assert found.folder is not None and (found.folder / "inductor/ab/kernel.so").read_text() == "second"
    told = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(told) == 1 and "is damaged and set aside" in told[0]
    assert list(kernel_cache.garbage(store(tmp_path), "0123456789abcdef" * 4, False)) == list(
        store(tmp_path).glob(".*damaged*")
    )
    assert set(kernel_cache.garbage(store(tmp_path), "0123456789abcdef" * 4, True)) == {
        cache,
        *store(tmp_path).glob(".*damaged*"),
    }
    assert not list(kernel_cache.garbage(store(tmp_path), "f" * 64, True)), "another campaign's image"


def test_what_cannot_be_filled_is_done_without(tmp_path: Path, capsys: Any) -> None:
    def fails() -> Any:
        raise TrialFailed("judge_failed", "substrate.warm_up ended with exit code 1")

    def is_full() -> Any:
        raise OSError(28, "No space left on device")

    for number, fill in enumerate((fails, is_full, None)):
        found = kernel_cache.obtain(str(tmp_path), KEY, tmp_path / f"{number}", fill)
        assert (found.folder, found.digest) == (None, "") and found.said.startswith("no cache: ")
        assert "kernels: going on without a cache, because" in capsys.readouterr().err
    assert not [path for path in store(tmp_path).iterdir() if path.is_dir()]
    own = store(tmp_path).parent
    own.chmod(0o755)
    assert "not this user's alone" in kernel_cache.obtain(str(tmp_path), KEY, tmp_path / "x", fill_with(tmp_path)).said


def test_a_copy_that_fails_does_not_damage_the_cache(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """The worker's disk is full, and not the store: every later worker would compile again."""
    kernel_cache.obtain(str(tmp_path), KEY, tmp_path / "a", fill_with(tmp_path, "first"))
    copytree = kernel_cache.shutil.copytree

    def full(source: Path, target: Path, *more: Any, **how: Any) -> Any:
        copytree(source, target, *more, **how)
        raise kernel_cache.shutil.Error([(str(source), str(target), "[Errno 28] No space left on device")])

    monkeypatch.setattr(kernel_cache.shutil, "copytree", full)
    found = kernel_cache.obtain(str(tmp_path), KEY, tmp_path / "b", fill_with(tmp_path, "second"))
    monkeypatch.undo()
    assert found.folder is None and "No space left" in found.said and not (tmp_path / "b").exists()
    assert "damaged" not in capsys.readouterr().err
    again = kernel_cache.obtain(str(tmp_path), KEY, tmp_path / "c", fill_with(tmp_path, "third"))
    assert (tmp_path / "c/inductor/ab/kernel.so").read_text() == "first" and again.digest


def test_a_cache_that_another_worker_sets_aside_meanwhile_leaves_no_half_copy(tmp_path: Path, monkeypatch: Any) -> None:
    """The next copy goes to the same folder. It met the half one, and took the whole cache for a damaged one."""
    kernel_cache.obtain(str(tmp_path), KEY, tmp_path / "a", fill_with(tmp_path, "first"))
    copytree, calls = kernel_cache.shutil.copytree, list[str]()

    def set_aside(source: Path, target: Path, *more: Any, **how: Any) -> Any:
        if not calls:
            calls.append("once")
            (target / "inductor").mkdir(parents=True)
            os.rename(store(tmp_path) / KEY, store(tmp_path) / f".{KEY}.damaged.elsewhere.1")
            raise FileNotFoundError(source)
        return copytree(source, target, *more, **how)

    monkeypatch.setattr(kernel_cache.shutil, "copytree", set_aside)
    found = kernel_cache.obtain(str(tmp_path), KEY, tmp_path / "b", fill_with(tmp_path, "second"))
    assert found.folder and (tmp_path / "b/inductor/ab/kernel.so").read_text() == "second"


def test_waiting_has_a_limit_and_heeds_a_signal(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(kernel_cache, "POLL_SECONDS", 0.01)
    kernel_cache.obtain(str(tmp_path), KEY, tmp_path / "a", None)
    with open(store(tmp_path) / f".{KEY}.lock", "w") as file:
        assert kernel_cache._locked(file)
        left = store(tmp_path) / f".{KEY}.partial.elsewhere.1"
        left.mkdir()
        assert not list(kernel_cache.garbage(store(tmp_path), "0123456789abcdef" * 4, True)), "it is being filled"
        found = kernel_cache.obtain(str(tmp_path), KEY, tmp_path / "b", fill_with(tmp_path), wait_seconds=0.05)
        assert found.folder is None and "another worker of this node fills it" in found.said
        assert "waiting, 0 of at most 0 s" in capsys.readouterr().err

        def stop() -> None:
            raise Interrupted("stopped")

        with pytest.raises(Interrupted):
            kernel_cache.obtain(str(tmp_path), KEY, tmp_path / "c", fill_with(tmp_path), stop)
    with pytest.raises(Interrupted):  # a signal while it compiles
        kernel_cache.obtain(str(tmp_path), KEY, tmp_path / "d", stop)
    assert list(kernel_cache.garbage(store(tmp_path), "0123456789abcdef" * 4, False)) == [left]


def test_a_killed_worker_leaves_nothing_that_counts(tmp_path: Path) -> None:
    """A fill that was killed while it was copied: the next worker fills again, and removes what is left."""
    kernel_cache.obtain(str(tmp_path), KEY, tmp_path / "a", None)
    left = store(tmp_path) / f".{KEY}.partial.{os.uname().nodename}.99999999"
    (left / "tree").mkdir(parents=True)
    found = kernel_cache.obtain(str(tmp_path), KEY, tmp_path / "b", fill_with(tmp_path))
    assert found.digest and not left.exists()


def test_no_sandbox_gets_a_bind_of_the_store(tmp_path: Path) -> None:
    """Every source that bubblewrap is told of, of a trial and of judging; and each copy shares no file with another."""
    chosen = settings.compose(["cluster.kernels=compiled", f"cluster.scratch_dir={tmp_path}"])
    kernels = kernel_cache.obtain(str(tmp_path), KEY, tmp_path / "own", fill_with(tmp_path))
    attempt = SimpleNamespace(task_dir=tmp_path / "task")
    for name in ("task", "fork", "out"):
        (tmp_path / name).mkdir()
    files = []
    for number in range(2):
        own = image_process.kernel_bind(chosen, kernels, tmp_path / f"trial-{number}", os.geteuid())
        sandbox = multinode.training_sandbox(chosen, attempt, {}, tmp_path / "fork", tmp_path / "out", {}, own)
        sources: list[Path] = []
        staging = SimpleNamespace(bind=lambda source: sources.append(source) or str(source), write=lambda text: "text")  # noqa: B023
        arguments = sandbox._arguments(staging)
        place = arguments.index("/kernels")
        assert arguments[place - 2 : place] == ["--bind", str(tmp_path / f"trial-{number}")]
        forbidden = [store(tmp_path), tmp_path / "own"]
        assert not [s for s in sources for f in forbidden if f == s or f in s.parents or s in f.parents]
        assert sandbox.environment()["TORCHINDUCTOR_CACHE_DIR"] == "/kernels/inductor"
        files.append(tmp_path / f"trial-{number}/inductor/ab/kernel.so")
    files += [tmp_path / "own/inductor/ab/kernel.so", store(tmp_path) / KEY / "tree/inductor/ab/kernel.so"]
    assert len({path.stat().st_ino for path in files}) == 4
    files[0].write_text("evil")
    assert [path.read_text() for path in files[1:]] == ["code"] * 3


def test_the_first_worker_asks_the_image_for_it(tmp_path: Path, monkeypatch: Any) -> None:
    """The task is of the golden file's form. A second worker of another arm asks nobody, and one with another layout asks anew."""
    asked: list[dict[str, Any]] = []

    def start(pristine: Path, entry: str, _: Any, binds: Any, work: Path, *more: Any) -> Path:
        asked.append({"entry": entry, "pristine": pristine, **json.loads((work / "task/task.json").read_text())})
        (work / "kernels/triton").mkdir(parents=True)
        (work / "out").mkdir()
        names = {"scan": "torch", "experts": "sequential", "packed": "padded", "elementwise": "compiled"}
        (work / "out/kernels.json").write_text(json.dumps({**names, "reason": "no GPU"}))
        return work / "out"

    monkeypatch.setattr(image_process, "start", start)
    mount = image.Mount(tmp_path / "root", "0123456789abcdef" * 4, "unpack")
    found = []
    for number, more in enumerate(([], ["recipe.lora.rank=4"], ["parallelism=tp1"])):
        chosen = settings.compose(["cluster.kernels=compiled", f"cluster.scratch_dir={tmp_path}", *more])
        (tmp_path / f"{number}").mkdir()
        found.append(image_process.warm_kernels(mount, chosen, tmp_path / f"{number}", tmp_path / "log"))
    golden = json.loads((ROOT / "tests/golden/warm_up_task.json").read_text())
    assert [(each["entry"], each["pristine"]) for each in asked] == [("warm_up", tmp_path / "root")] * 2
    for name in ("config", "paths"):
        assert {key: type(value) for key, value in asked[0][name].items()} == {
            key: type(value) for key, value in golden[name].items()
        }
    assert (asked[0]["kind"], asked[0]["schema"]) == ("warm_up", 1)
    assert "scan torch, experts sequential, packed padded, elementwise compiled" in found[1].said
    assert len([path for path in store(tmp_path).iterdir() if path.name.startswith("0123456789abcdef-cpu-")]) == 2


def test_where_nothing_compiles_nothing_is_bound(tmp_path: Path) -> None:
    chosen = settings.compose([])
    assert image_process.kernel_bind(chosen, None, tmp_path / "x", os.geteuid()) == {}
    assert image_process.kernel_env(chosen) == {}
    assert image_process.sandbox_of(chosen, {}, {}, 0).environment()["TORCHDYNAMO_DISABLE"] == "1"
    forced = settings.compose(["cluster.kernels=compiled"])
    env = image_process.sandbox_of(forced, {}, {}, 0).environment()
    assert (env["TORCHDYNAMO_DISABLE"], env["SUBSTRATE_KERNELS"]) == ("0", "elementwise=compiled")
    assert image_process.kernel_bind(forced, None, tmp_path / "y", os.geteuid()) == {"/kernels": tmp_path / "y"}
    assert not list((tmp_path / "y").iterdir())
    on_gpus = settings.compose(["cluster.gpus_per_node=8", "cluster.kernels=eager"])
    assert image_process.kernel_env(on_gpus)["TORCHDYNAMO_DISABLE"] == "1"
    assert image_process.kernel_env(on_gpus)["TRITON_CACHE_AUTOTUNING"] == "1", "the scan is tuned anyway"


def test_the_type_of_a_gpu(tmp_path: Path) -> None:
    for number, name in enumerate(("NVIDIA H200", "NVIDIA H200", "NVIDIA L4")):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "information").write_text(
            f"Model: \t\t {name}\nGPU UUID:    GPU-{number}\nDevice Minor: \t {number}\n"
        )
    node = devices.NodeDevices(gpus=(0, 1), env={"CUDA_VISIBLE_DEVICES": "0,1"})
    assert devices.kind_of(node, tmp_path) == "NVIDIA H200"
    assert devices.kind_of(devices.NodeDevices(gpus=(2,)), tmp_path) == "NVIDIA L4"
    assert devices.kind_of(devices.NodeDevices(gpus=(7,)), tmp_path) == "gpu of unknown type"
    part = devices.NodeDevices(gpus=(0,), env={"CUDA_VISIBLE_DEVICES": "MIG-1"})
    assert devices.kind_of(part, tmp_path) == "part of NVIDIA H200"
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("model name\t: A CPU\nflags\t\t: sse avx2\n")
    two.write_text("model name\t: A CPU\nflags\t\t: sse avx2 avx512f\n")
    names = [devices.kind_of(None, tmp_path, processor) for processor in (one, two)]
    assert names[0] != names[1] and all(name.startswith("cpu ") and name.endswith(" A CPU") for name in names)
    assert kernel_cache.slug("NVIDIA H200 (MIG 1g.18gb)") == "nvidia-h200-mig-1g-18gb"


def test_a_copy_of_nothing_and_one_that_fails_are_empty(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def is_full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kernel_cache.shutil, "copytree", is_full)
    for number, kernels in enumerate((Kernels(None, "", "no cache"), Kernels(tmp_path, "digest", "said"))):
        folder = kernels.private_copy(tmp_path / f"{number}" / "b", os.geteuid())
        assert folder.is_dir() and not list(folder.iterdir())
        assert ("it cannot be copied: [Errno 28]" in capsys.readouterr().err) == bool(number)
