"""A list of submissions in memory: records like the sealed log's, without its chain."""

from pipeline.decision.board_submissions import submissions_in
from pipeline.decision.submission_caps import Caps, attempt_day, reservation

CAPS = Caps(per_day=3, per_campaign=9, held_back=2, reference=2)
DAY, NEXT, BEFORE = "2026-11-24", "2026-11-25", "2026-11-23"


class Log(list):
    """Records as the sealed log has them, without its chain."""

    def reserve(self, arm="a1", round_name="r0001", purpose="slot", today=DAY, caps=CAPS, copy=1, digest=None) -> int:
        given = {"round_name": round_name, "arm": arm, "purpose": purpose, "target": "kaggle", "copy": copy}
        one = reservation(self, caps, adapter_digest=digest or f"{round_name}/{arm}", today=today, **given)
        if one.number > len(submissions_in(self)):
            names = ("number", "round", "arm", "purpose", "adapter_digest", "target", "day")
            self.append({"event": "submission"} | {name: getattr(one, name) for name in names})
        return one.number

    def attempt(self, number: int, today=DAY, caps=CAPS) -> None:
        self.append(
            {"event": "board_attempt", "number": number, "day": attempt_day(submissions_in(self), caps, number, today)}
        )

    def score(self, number: int, score: str | None, **more) -> None:
        self.append({"event": "board_score", "number": number, "score": score, **more})
