"""The few exceptions of the pipeline. Each says in one sentence what came and what is valid, and carries an exit code.

    0 done   1 the work failed   2 usage or configuration   3 refused by the constitution   4 integrity
    75 interrupted with the state saved: start it again   93 no progress in several starts   130 Ctrl-C

Nothing is raised for control flow, and nothing here is caught to be ignored: `__main__` prints the sentence and exits with the code;
the worker turns it into a typed outcome (`exit_class` is the class's `kind`).
"""


class PipelineError(Exception):
    """Base of every expected failure. `cure`, where there is one, is the next thing to type or to change."""

    exit_code = 1
    kind = "failed"

    def __init__(self, what: str, cure: str = "") -> None:
        self.what = what
        self.cure = cure
        super().__init__(f"{what}. {cure}" if cure else what)


class WorkFailed(PipelineError):
    """A step ended without its product: a crash, a time limit, a full disk."""


class TrialFailed(WorkFailed):
    """The trial's own process failed; `kind` tells how: configuration, data, diverged, out_of_memory, killed, crashed,
    stalled, timeout, disk_limit, bad_output."""

    def __init__(self, kind: str, what: str, cure: str = "") -> None:
        super().__init__(what, cure)
        self.kind = kind


class TargetFailed(WorkFailed):
    """The external target gave no score, and may be asked again; `kind` tells how: client_missing, credentials, rules, limit,
    rejected, unreachable, timeout, not_a_score, unclear, no_archive, local_board."""

    def __init__(self, kind: str, what: str, cure: str = "") -> None:
        super().__init__(what, cure)
        self.kind = kind


class NoProgress(WorkFailed):
    """Started again and again, and each time cut short where it was before: not started once more by itself."""

    exit_code = 93
    kind = "no_progress"


class Interrupted(WorkFailed):
    """Stopped from outside (signal, preemption) with the state saved; the same attempt may go on."""

    exit_code = 75
    kind = "interrupted"


class ConfigError(PipelineError):
    """Wrong usage, an unknown key or value, a layout that does not fit."""

    exit_code = 2
    kind = "configuration"


class NotFound(ConfigError):
    """A round, arm, file or program that is not there; `cure` lists what is."""

    kind = "not_found"


class Refused(PipelineError):
    """The constitution forbids it. `article` is its number, `code` the stable reason code."""

    exit_code = 3
    kind = "refused"

    def __init__(self, article: str, code: str, what: str, cure: str = "") -> None:
        self.article = article
        self.code = code
        super().__init__(f"article {article} ({code}): {what}", cure)


class IntegrityError(PipelineError):
    """A digest, schema or seal does not match: a changed image, a truncated file, an edited record."""

    exit_code = 4
    kind = "integrity"
