"""Test where the binds of a sandbox are staged: a machine may close /tmp, and TMPDIR then counts."""

import os
from pathlib import Path

import pytest

from pipeline.campaign.errors import ConfigError
from pipeline.sandbox import namespace


def test_tmpdir_counts_where_the_trial_may_enter_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = os.geteuid(), 65534
    place = tmp_path / "scratch"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    assert namespace.staging_place(own) == place
    tmp_path.chmod(0o700)
    assert namespace.staging_place(other) == Path("/tmp")  # nobody may not enter it
    monkeypatch.setenv("TMPDIR", "")
    assert namespace.staging_place(other) == Path("/tmp")


def test_without_a_place_the_error_names_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    closed = [Path("/tmp")]
    monkeypatch.setattr(os, "access", lambda path, mode: path not in closed and access(path, mode))
    assert namespace.staging_place(os.geteuid()) == Path("/var/tmp")
    closed.append(Path("/var/tmp"))
    with pytest.raises(ConfigError) as error:
        namespace.staging_place(os.geteuid())
    said = str(error.value)
    assert all(f"you may not write in {place}" in said for place in (tmp_path / "absent", "/tmp", "/var/tmp"))
    assert "Set TMPDIR to a folder on a local disk in which you may write" in said


def test_a_scratch_folder_that_cannot_be_made_is_told_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"you may not write in /absent\. set cluster\.scratch_dir \(or TMPDIR\)"):
        namespace.scratch_place("/absent")

    def none() -> str:
        raise FileNotFoundError

    monkeypatch.setattr(namespace.tempfile, "gettempdir", none)
    with pytest.raises(ConfigError, match="you may write in none of TMPDIR"):
        namespace.scratch_place("")
