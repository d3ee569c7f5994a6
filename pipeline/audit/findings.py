"""What an audit says: what it verified, what nobody can verify from what is there, and what is wrong, by record or file. No I/O."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """`record`: number of a record of the log, `file`: path below the campaign; one of them is given, `what` is a sentence."""

    record: int | None
    file: str | None
    what: str

    def __str__(self) -> str:
        where = f"record {self.record}" if self.record is not None else self.file or "the campaign"
        return f"{where}: {self.what}"


@dataclass
class Report:
    """Filled by each part of an audit in turn."""

    verified: list[str] = field(default_factory=list)
    not_verifiable: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.findings

    def record(self, seq: int, what: str) -> None:
        self._add(Finding(seq, None, what))

    def file(self, path: str, what: str) -> None:
        self._add(Finding(None, path, what))

    def _add(self, finding: Finding) -> None:
        if finding not in self.findings:
            self.findings.append(finding)

    def checked(self, what: str, since: int) -> None:
        """Verified, unless something was found since there were `since` findings."""
        if len(self.findings) == since and what not in self.verified:
            self.verified.append(what)

    def unknown(self, what: str) -> None:
        if what not in self.not_verifiable:
            self.not_verifiable.append(what)

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "verified": self.verified,
            "not_verifiable": self.not_verifiable,
            "findings": [asdict(finding) for finding in self.findings],
        }
