"""Test that a site's file in which YAML reads something else than was meant is refused, with its name and the cure."""

import re
from pathlib import Path

import pytest

from pipeline.campaign.errors import ConfigError
from pipeline.config import override_errors, settings


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("account: 0123", "has account, which YAML reads as 83"),
        ("qos: on", "has qos, which YAML reads as True"),
        ("meta: {partition: 7}", "has partition, which YAML reads as 7"),
        ("account: 1e5", ""),  # to YAML this is a word
        ("mem: 900", "has mem, which YAML reads as 900"),
        ("sbatch: {time-min: 1:00:00}", "has time-min: 1:00:00, which YAML reads as a number to the base of 60"),
        ("a: [1", "is not YAML"),
        ("a: {b", "is not YAML"),
        ("\tkind: slurm", "is not YAML"),
        ("sbatch: {exclude: n[1-3]}", "is not YAML"),
        ("account: '0123'", ""),
        ("partition: null", ""),
    ],
)
def test_case_06_what_yaml_reads_otherwise_is_refused(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "cluster").mkdir()
    path = tmp_path / "cluster" / "mine.yaml"
    path.write_text(text + "\n")
    if not what:
        override_errors.check_site_files(tmp_path)
        return
    with pytest.raises(ConfigError, match=re.escape(f"{path} {what}")):
        override_errors.check_site_files(tmp_path)


def test_case_06_a_file_that_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "mine.yaml").write_bytes("# Möhre\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8 text .*Save it as UTF-8"):
        override_errors.check_site_files(tmp_path)


def test_the_shipped_files_pass() -> None:
    override_errors.check_site_files(settings.SOURCE)
