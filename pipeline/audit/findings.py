"""The report of an audit: what it verified, what nobody can verify from these files, and what is wrong, by record or file. No I/O."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.campaign.errors import PipelineError

ERRORS_ON_BAD_RECORDS = (PipelineError, AttributeError, KeyError, IndexError, TypeError, ValueError, ArithmeticError)
"""What code that expects honest records may raise on others. The audit then reports a finding."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a record of the log (its number) or with a file (its path below the campaign).

    `what` is the predicate of a sentence whose subject is the record or the file, or a sentence of its own.
    """

    record: int | None
    file: str | None
    what: str

    def __str__(self) -> str:
        where = f"record {self.record}" if self.record is not None else self.file or "the campaign"
        return f"{where}: {self.what}"


@dataclass
class Report:
    """What an audit found. Each part of the audit adds to it."""

    verified: list[str] = field(default_factory=list)
    not_verifiable: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.findings

    def record(self, seq: int, what: str) -> None:
        """Add a finding about a record of the log."""
        self._add(Finding(seq, None, what))

    def file(self, path: str, what: str) -> None:
        """Add a finding about a file of the campaign."""
        self._add(Finding(None, path, what))

    def _add(self, finding: Finding) -> None:
        if finding not in self.findings:
            self.findings.append(finding)

    def checked(self, what: str, since: int) -> None:
        """Report `what` as verified, unless there are more findings now than `since`, their number before the check."""
        if len(self.findings) == since and what not in self.verified:
            self.verified.append(what)

    def unknown(self, what: str) -> None:
        """Report what cannot be verified from these files."""
        if what not in self.not_verifiable:
            self.not_verifiable.append(what)

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "verified": self.verified,
            "not_verifiable": self.not_verifiable,
            "findings": [asdict(finding) for finding in self.findings],
        }
