"""Test weights outside of the image: only the right bytes are used, hashed once and staged once, even if a process is killed."""

import json
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import tokenizers

from pipeline.campaign.errors import ConfigError, IntegrityError, NotFound, WorkFailed
from pipeline.config import settings
from pipeline.execution import base_weights
from pipeline.rounds.init import build_image
from pipeline.sandbox.namespace import run_program
from substrate.data.tokenizer import Tokenizer
from substrate.formats import published_tokenizer
from substrate.interface.errors import DataError
from tests.support.paths import ROOT
from tests.support.published import TEMPLATE, published_folder

OUTSIDE = ["experiment=smoke", "model.weights=base/weights.json"]


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder of a site: a checkpoint, its manifest; proofs go into a temporary folder of its own."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    folder = published_folder(tmp_path / "checkpoint")
    (tmp_path / "weights.json").write_text(json.dumps(base_weights.build_manifest(str(folder))))
    return tmp_path


def ready(site: Path, stage: str = "") -> Path:
    return base_weights.verified_folder(
        site / "weights.json", str(site / "checkpoint"), str(site / stage) if stage else ""
    )


def hashed(monkeypatch) -> list[str]:
    """Names of the files that are hashed from now on."""
    names: list[str] = []
    real = base_weights.file_digest
    monkeypatch.setattr(base_weights, "file_digest", lambda path: names.append(path.name) or real(path))
    return names


def change_a_byte(path: Path) -> None:
    """One byte, with size and times as they were."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("stage", ["", "stage"])
def test_weights_are_hashed_once_and_again_when_anything_changed(site, monkeypatch, stage):
    folder = ready(site, stage)
    names = hashed(monkeypatch)
    assert ready(site, stage) == folder
    assert names == []
    os.utime(folder / "model.safetensors")
    ready(site, stage)
    assert "model.safetensors" in names
    change_a_byte(folder / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"model\.safetensors has sha256 .* but the image names"):
        ready(site, stage)


def test_a_changed_source_is_never_staged(site):
    change_a_byte(site / "checkpoint" / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"model\.safetensors has sha256"):
        ready(site, "stage")
    assert not [path for path in (site / "stage").iterdir() if path.is_dir()]


def test_a_missing_file_is_named(site):
    (site / "checkpoint" / "tokenizer.json").unlink()
    with pytest.raises(NotFound, match=r"lacks tokenizer\.json"):
        ready(site)
    with pytest.raises(NotFound, match="is not a published checkpoint"):
        base_weights.build_manifest(str(site / "checkpoint"))


def test_what_is_missing_of_the_shards_is_said_before_anything_is_hashed(site, monkeypatch):
    names, folder = hashed(monkeypatch), site / "checkpoint"
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(
        NotFound, match="lacks model-00002-of-00002.safetensors, which its index names.*Copy the published"
    ):
        base_weights.build_manifest(str(folder))
    (folder / "model-00002-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    with pytest.raises(NotFound, match=r"00002.safetensors is a pointer of Git LFS.*Run `git lfs pull`"):
        base_weights.build_manifest(str(folder))
    for content in ("{}", "[]", '{"weight_map"'):
        index.write_text(content)
        with pytest.raises(IntegrityError, match="is no index of shards.*Copy the published file again"):
            base_weights.build_manifest(str(folder))
    assert names == []


@pytest.mark.parametrize("name", [pattern.replace("*", "other") for pattern in base_weights.PATTERNS])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.symlink_to("../../blobs/ab12"), "is a link to nothing"),
        (os.mkfifo, "is a folder, pipe or device"),
        (lambda path: path.symlink_to("/dev/zero"), "is a folder, pipe or device"),
    ],
    ids=["a dead link", "a pipe", "a device"],
)
def test_what_is_no_plain_file_is_named_and_never_read(site, name, make, words):
    path = site / "checkpoint" / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    make(path)
    with pytest.raises(NotFound, match=rf"{name} {words}.*`cp -rL` follows the links"):
        base_weights.published_files(str(site / "checkpoint"))


@pytest.mark.parametrize("named", ["../checkpoint/model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 5])
def test_an_index_names_files_of_its_own_folder_alone(site, named):
    index = site / "checkpoint" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": named}}))
    with pytest.raises(IntegrityError, match="is no index of shards"):
        base_weights.published_files(str(site / "checkpoint"))


def test_an_index_has_a_size_that_an_index_can_have(site):
    with open(site / "checkpoint" / "model.safetensors.index.json", "wb") as file:
        file.truncate(2**40)  # a file with a hole, which has no blocks
    with pytest.raises(IntegrityError, match="has more than 16777216 bytes"):
        base_weights.published_files(str(site / "checkpoint"))


def test_what_a_killed_worker_left_is_replaced(site):
    partial = site / "stage" / f".{ready(site, 'stage').name}.partial"
    shutil.rmtree(ready(site, "stage"))
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    folder = ready(site, "stage")
    assert (folder / "model.safetensors").read_bytes() == (site / "checkpoint" / "model.safetensors").read_bytes()
    assert not partial.exists()


def test_workers_of_one_node_make_one_copy(site):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=ready, args=(site, "stage")) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len([path for path in (site / "stage").iterdir() if path.is_dir()]) == 1


def test_too_small_a_disk_is_said_before_anything_is_copied(site, monkeypatch):
    usage = shutil.disk_usage(site)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        WorkFailed, match=r"0\.0 GB free, but the weights have 0\.0 GB.* leave cluster\.stage_dir empty"
    ):
        ready(site, "stage")


def test_proofs_of_others_are_not_believed(site):
    own = site / "tmp" / f"postrain-{os.getuid()}"
    own.mkdir(mode=0o700)
    own.chmod(0o777)
    with pytest.raises(IntegrityError, match="is not this user's alone"):
        ready(site)


@pytest.mark.parametrize(("folder", "words"), [("", "weights_dir is empty"), ("/nowhere", "is not a folder here")])
def test_no_folder_is_said_before_an_image_is_made(tmp_path, folder, words):
    chosen = settings.compose([*OUTSIDE, f"cluster.weights_dir={folder}"])
    with pytest.raises(ConfigError, match=words):
        build_image(chosen, tmp_path / "substrate.sqsh")


@pytest.mark.slow
def test_the_image_names_the_weights_and_holds_their_tokenizer(site):
    chosen = settings.compose([*OUTSIDE, f"cluster.weights_dir={site / 'checkpoint'}"])
    build_image(chosen, site / "substrate.sqsh")
    run_program("unsquashfs", "-d", str(site / "image"), "-quiet", "-no-progress", str(site / "substrate.sqsh"))
    base = site / "image" / "base"
    names = ["chat_template.jinja", "tokenizer.json", "tokens.json", "weights.json"]
    assert sorted(path.name for path in base.iterdir()) == names
    assert (base / "chat_template.jinja").read_text() == TEMPLATE
    assert Tokenizer.from_file(base / "tokenizer.json").special == published_tokenizer.read(site / "checkpoint").special
    assert (base / "tokenizer.json").read_bytes() == (site / "checkpoint" / "tokenizer.json").read_bytes()
    assert base_weights.verified_folder(base / "weights.json", str(site / "checkpoint"), "") == site / "checkpoint"
    assert "substrate-tiny" in (site / "image" / "manifest.yaml").read_text()


def test_further_templates_are_named_and_staged(site):
    more = site / "checkpoint" / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text(TEMPLATE)
    manifest = base_weights.build_manifest(str(site / "checkpoint"))
    assert "additional_chat_templates/tool_use.jinja" in manifest["files"]
    (site / "weights.json").write_text(json.dumps(manifest))
    assert (ready(site, "stage") / "additional_chat_templates" / "tool_use.jinja").read_text() == TEMPLATE


@pytest.mark.slow
def test_an_image_is_not_built_from_a_tokenizer_that_the_model_has_no_rows_for(site):
    encoder = tokenizers.Tokenizer.from_file(str(site / "checkpoint" / "tokenizer.json"))
    encoder.add_tokens([f"word{number}" for number in range(512)])
    encoder.save(str(site / "checkpoint" / "tokenizer.json"))
    chosen = settings.compose([*OUTSIDE, f"cluster.weights_dir={site / 'checkpoint'}"])
    with pytest.raises(ConfigError, match=f"cluster.weights_dir = {site}/checkpoint: .* token ids, the model 512 rows"):
        build_image(chosen, site / "substrate.sqsh")


def test_an_image_is_not_built_from_weights_of_another_model(site, monkeypatch):
    names = hashed(monkeypatch)
    chosen = settings.compose([*OUTSIDE, f"cluster.weights_dir={site / 'checkpoint'}", "model.moe_ffn_size=192"])
    with pytest.raises(ConfigError, match=r"experts.0.up_proj.weight has shape \[96, 96\]"):
        build_image(chosen, site / "substrate.sqsh")
    assert names == []


def test_a_refusal_of_the_image_s_code_is_one_of_the_configuration(site):
    (site / "checkpoint" / "config.json").write_text('{"hidden_size": 97}')
    chosen = settings.compose([*OUTSIDE, f"cluster.weights_dir={site / 'checkpoint'}"])
    with pytest.raises(ConfigError) as refused:
        build_image(chosen, site / "substrate.sqsh", is_draft=True)
    assert "config.json: hidden_size is 97, but 96 in the model's configuration" in refused.value.what
    assert refused.value.cure.startswith("Choose the configuration of this checkpoint") and "error:" not in str(
        refused.value
    )


def test_a_folder_that_nobody_reads_is_told(site):
    inside, outside = settings.compose().to_dict()["model"], settings.compose(OUTSIDE).to_dict()["model"]
    assert base_weights.unused(str(site), inside).startswith(
        f"cluster.weights_dir = {site} is not read, because the weights of the model tiny"
    )
    assert base_weights.unused(str(site), outside) == base_weights.unused("", inside) == ""


def test_the_tiny_tokenizer_is_not_taken_for_a_published_one(site):
    shutil.copyfile(ROOT / "substrate/base/tokenizer.json", site / "checkpoint" / "tokenizer.json")
    (site / "checkpoint" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(DataError, match="is more than one token"):
        published_tokenizer.check(site / "checkpoint")
