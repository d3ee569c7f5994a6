"""The expected failures of a substrate process: each prints one line on stderr and exits with its code (docs/contract.md).

    0 done   64 the task file or the command line is wrong   65 the data are wrong   66 the training diverged
    67 out of memory   75 stopped on request with the state saved: start me again

An engine that fails exits with 1 and its line. Any other exception is a crash: Python prints the traceback and exits with 1.
"""

import sys
from collections.abc import Callable


class SubstrateError(Exception):
    """Base of the expected failures. Its message is one line that says what came and what is valid."""

    exit_code = 1


class UsageError(SubstrateError):
    """A wrong command line, task file or configuration."""

    exit_code = 64


class DataError(SubstrateError):
    """A wrong input file."""

    exit_code = 65


class Diverged(SubstrateError):
    """The loss or its gradient is not finite, or the loss is far above that of guessing. No adapter is written."""

    exit_code = 66


class OutOfMemory(SubstrateError):
    """The device or the host could not allocate a tensor."""

    exit_code = 67


class EngineFailed(SubstrateError):
    """The engine that decodes left an item out, or broke one off."""


class Stopped(SubstrateError):
    """The process saw the stop file and saved its state. This is no failure: the caller may start the same task again."""

    exit_code = 75


def exit_code_of(main: Callable[[], None]) -> int:
    """Runs `main` and returns 0; on an expected failure prints its line on stderr and returns its exit code."""
    try:
        main()
    except SubstrateError as error:
        print(f"error: {error}" if error.exit_code != Stopped.exit_code else str(error), file=sys.stderr)
        return error.exit_code
    return 0
