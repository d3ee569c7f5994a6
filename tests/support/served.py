"""A site whose vLLM is tests/standins/vllm: the folder that cluster.vllm_runtime names, and the weights that it serves."""

import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import ROOT


@dataclass(frozen=True)
class Site:
    """runtime: holds bin/vllm. weights: holds `scenario`, and what else the stand-in reads."""

    runtime: Path
    weights: Path

    @classmethod
    def make(cls, folder: Path, scenario: str = "good_edit") -> "Site":
        site = cls(folder / "runtime", folder / "weights")
        (site.runtime / "bin").mkdir(parents=True)
        site.weights.mkdir()
        (site.weights / "scenario").write_text(scenario)
        program = site.runtime / "bin" / "vllm"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/standins/vllm_serve "$@"\n')
        program.chmod(0o755)
        return site

    def words(self, *further: str) -> list[str]:
        """The overrides of a campaign of this site."""
        return [
            "experiment=smoke", "worker=served", f"cluster.vllm_runtime={self.runtime}", f"worker.server.weights_dir={self.weights}", *further
        ]  # fmt: skip
