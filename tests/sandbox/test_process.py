"""Test that a sandbox never starts with the caller's session keyring because a quota was full."""

import ctypes
import errno
import sys
from types import SimpleNamespace

import pytest

from pipeline.campaign.errors import WorkFailed
from pipeline.sandbox import process


def kernel(monkeypatch: pytest.MonkeyPatch, *errors: int) -> list[int]:
    """A kernel that answers with these errors, the last one for ever; 0 is success. Returns the answers that were given."""
    given: list[int] = []

    def syscall(*_: object) -> int:
        error = errors[min(len(given), len(errors) - 1)]
        given.append(error)
        ctypes.set_errno(error)
        return -1 if error else 7

    monkeypatch.setattr(process, "LIBC", SimpleNamespace(syscall=syscall))
    monkeypatch.setattr(process, "KEYCTL", dict.fromkeys(("x86_64", "aarch64"), 0))
    monkeypatch.setattr(process.time, "sleep", lambda seconds: None)
    return given


def test_a_full_quota_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    given = kernel(monkeypatch, errno.EDQUOT, errno.EDQUOT, 0)
    process._leave_keyring()
    assert given == [errno.EDQUOT, errno.EDQUOT, 0]


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM])
def test_where_nobody_can_use_keys_there_is_none_to_leave(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    assert kernel(monkeypatch, error) == [] and process._leave_keyring() is None


def test_no_sandbox_starts_while_the_quota_stays_full(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    kernel(monkeypatch, errno.EDQUOT)
    monkeypatch.setattr(process, "UNMOVED", (sys.executable, "-c", "pass"))
    with pytest.raises(WorkFailed, match="may hold no more kernel keys"):
        process.launch([], tmp_path / "log", {})
