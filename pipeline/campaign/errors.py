"""The exceptions of the pipeline. Each says in one sentence what came and what is valid, and carries the process's exit code.

    0 done   1 the work failed   2 usage or configuration   3 refused by the constitution   4 integrity
    75 interrupted with the state saved: start it again   93 no progress in several starts   130 Ctrl-C

No code raises these for control flow or catches one to ignore it. `__main__` prints the sentence and exits with the code; the worker
records a typed outcome whose `exit_class` is the exception's `kind`.
"""


class PipelineError(Exception):
    """Base of every expected failure. `what` says what happened; `cure`, where there is one, says what to type or to change next."""

    exit_code = 1
    kind = "failed"

    def __init__(self, what: str, cure: str = "") -> None:
        self.what = what
        self.cure = cure
        super().__init__(f"{what}. {cure}" if cure else what)


class WorkFailed(PipelineError):
    """A step ended without its product, for example by a crash, a time limit or a full disk."""


class SlurmRefused(WorkFailed):
    """sbatch refused a job for what it asks for; the controller answered, and no job of the submission is left."""


class FilesUnreachable(WorkFailed):
    """A file system failed several times in a row, so whether a file is there, and what is in it, is not known."""

    kind = "files_unreachable"


class JudgeWanted(WorkFailed):
    """A meta stage needs something judged that it cannot judge itself; the log says what, and a judge job is to be submitted."""


class TrialFailed(WorkFailed):
    """The trial's own process failed. `kind` is one of: configuration, data, diverged, out_of_memory, killed, crashed,
    stalled, timeout, disk_limit, bad_output."""

    def __init__(self, kind: str, what: str, cure: str = "") -> None:
        super().__init__(what, cure)
        self.kind = kind


class TargetFailed(WorkFailed):
    """The external target gave no score and may be asked again. `kind` is one of: client_missing, client_broken, credentials, rules,
    limit, rejected, unreachable, timeout, not_a_score, unclear, no_archive, local_board, late."""

    def __init__(self, kind: str, what: str, cure: str = "") -> None:
        super().__init__(what, cure)
        self.kind = kind


class NoProgress(WorkFailed):
    """Several starts in a row ended at the same point, so the arm is not started again without a person."""

    exit_code = 93
    kind = "no_progress"


class Interrupted(WorkFailed):
    """A signal or preemption stopped the work, and its state is saved: the next start resumes it."""

    exit_code = 75
    kind = "interrupted"


class ConfigError(PipelineError):
    """The user gave a wrong command, an unknown key or value, or settings that do not fit together."""

    exit_code = 2
    kind = "configuration"


class NotFound(ConfigError):
    """A round, arm, file or program does not exist; `cure` lists those that do."""

    kind = "not_found"


class OtherRules(ConfigError):
    """The campaign froze other rules than this code has, so this code cannot judge it. Nothing is known to be wrong with the campaign."""

    kind = "other_rules"


class Refused(PipelineError):
    """The constitution forbids it. `article` is the number of its article, `code` the stable reason code."""

    exit_code = 3
    kind = "refused"

    def __init__(self, article: str, code: str, what: str, cure: str = "") -> None:
        self.article = article
        self.code = code
        super().__init__(f"article {article} ({code}): {what}", cure)


class IntegrityError(PipelineError):
    """A digest, schema or signature does not match: an image was changed, a file truncated or a record edited."""

    exit_code = 4
    kind = "integrity"


class OtherVersion(IntegrityError):
    """A file or a record does not have the form that this version reads. `__main__` asks whether another version wrote it."""
