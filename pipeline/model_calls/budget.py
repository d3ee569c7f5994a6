"""What calls of a model may cost: steps, tokens, money and wall time, held to the token also under parallel calls.

Before a call, an upper bound of its tokens is reserved: of the prompt (prompt_bounds.py), and of the answer what the request
allows, which is lowered to what is left. After it, what the answer's `usage` says is charged and the rest returned. A call that does not
fit waits while others are under way, because they reserve more than they use. So what is charged never exceeds a limit, unless the
endpoint counts more than the request allowed it. That is charged in full and ends the budget.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.campaign import strict_json
from pipeline.model_calls.failures import CallFailed

MILLION = 1_000_000
MOST_TOKENS = 10**12  # in one answer's usage; a larger number is nothing that anybody counted
CURES = {
    "budget_steps": "Raise worker.budget.steps in a new campaign, up to what article 16 allows",
    "budget_tokens": "Raise worker.budget.tokens in a new campaign, up to what article 16 allows",
    "budget_money": "Raise worker.budget.money in a new campaign, up to what article 16 allows",
    "budget_wall": "Raise worker.budget.wall_seconds in a new campaign, up to what article 16 allows, or use a faster endpoint",
}


class BudgetSpent(CallFailed):
    """A call would exceed the budget. `kind` is one of CURES; no later call is answered either, except where others return what they reserved."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(kind, what, CURES[kind])


@dataclass(frozen=True)
class Limits:
    """The limits of one agent. Money is in millionths of the configured currency, prices in those per million tokens."""

    steps: int  # answered calls
    tokens: int  # of prompts and answers together
    answer_tokens: int  # of one answer
    wall_seconds: float  # from the making of the budget
    money_millionths: int = 0  # 0: no limit
    prompt_price: int = 0
    answer_price: int = 0


@dataclass(frozen=True)
class Charge:
    """Tokens of one call. `is_bound`: the answer did not say, or said what cannot be, so the upper bound counts."""

    prompt_tokens: int
    answer_tokens: int
    is_bound: bool = False

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.answer_tokens


@dataclass(frozen=True)
class Spent:
    """What was charged so far, and the wall time since the budget was made."""

    steps: int
    prompt_tokens: int
    answer_tokens: int
    money_millionths: int  # rounded up
    wall_seconds: float


class Budget:
    """The budget of one agent. All methods may be called from any thread."""

    def __init__(
        self, limits: Limits, clock: Callable[[], float] = time.monotonic, before: Spent | None = None
    ) -> None:
        """clock: seconds, for tests. before: steps and tokens that earlier sessions of the same arm were charged."""
        self.limits = limits
        self._clock, self._begun = clock, clock()
        self._changed = threading.Condition()
        self._held: list[Charge] = []  # reserved by calls under way
        self._steps = before.steps if before else 0
        self._prompt, self._answer = (before.prompt_tokens, before.answer_tokens) if before else (0, 0)
        self._ended: BudgetSpent | None = None

    def reserve(self, prompt_bound: int, answer_tokens: int) -> Charge:
        """Reserve a call with at most these tokens, and return it with the answer's lowered to what is left. Raises BudgetSpent.

        While other calls are under way it waits for what they return, up to the end of the wall time.
        """
        wanted = min(answer_tokens, self.limits.answer_tokens)
        with self._changed:
            while True:
                kind, answer = self._room(prompt_bound, wanted)
                if kind in ("budget_wall", "ended") or not self._held:
                    if self._ended:
                        raise self._ended
                    if answer < 1:
                        raise BudgetSpent(kind, self._words(kind, prompt_bound))
                    break
                if answer == wanted:
                    break
                self._changed.wait(max(0.0, min(1.0, self.seconds_left())))
            reserved = Charge(prompt_bound, answer, True)
            self._held.append(reserved)
            return reserved

    def settle(self, reserved: Charge, charge: Charge, most_prompt: int = 0) -> None:
        """Charge an answered call and return the rest of what it had reserved.

        most_prompt: what the prompt can have at most, where what was reserved for it only rested on earlier counts. Raises BudgetSpent
        where the endpoint counted more than the call can have, or so much that a limit is exceeded; that is charged, and ends the budget.
        """
        allowed = Charge(max(reserved.prompt_tokens, most_prompt), reserved.answer_tokens)
        with self._changed:
            self._held.remove(reserved)
            self._steps += 1
            self._prompt += charge.prompt_tokens
            self._answer += charge.answer_tokens
            self._changed.notify_all()
            tokens, money = self._left()
            has_no_money = self.limits.money_millionths > 0 and (
                money < 0 or self._price(charge) > self._price(allowed)
            )
            if charge.tokens > allowed.tokens or tokens < 0 or has_no_money:
                kind = "budget_tokens" if charge.tokens > allowed.tokens or tokens < 0 else "budget_money"
                what = (
                    f"the endpoint counted {charge.tokens} tokens for a call for which {reserved.tokens} were reserved"
                )
                self._ended = self._ended or BudgetSpent(kind, what)
                raise self._ended

    def release(self, reserved: Charge) -> None:
        """Return what a call had reserved that got no answer. Nothing is charged for it."""
        with self._changed:
            self._held.remove(reserved)
            self._changed.notify_all()

    def seconds_left(self) -> float:
        """Wall time that is left, below 0 where it is over."""
        return self._begun + self.limits.wall_seconds - self._clock()

    def wall_is_over(self) -> BudgetSpent:
        """The failure of a call that the end of the wall time cut off."""
        return BudgetSpent("budget_wall", self._words("budget_wall", 0))

    def spent(self) -> Spent:
        """What was charged so far."""
        with self._changed:
            return Spent(self._steps, self._prompt, self._answer,
                         -(-self._price(Charge(self._prompt, self._answer)) // MILLION), self._clock() - self._begun)  # fmt: skip

    def held_tokens(self) -> int:
        """Tokens that are charged or reserved now."""
        with self._changed:
            return self._prompt + self._answer + sum(each.tokens for each in self._held)

    def _price(self, charge: Charge) -> int:
        """Millionths of a millionth of the currency."""
        return charge.prompt_tokens * self.limits.prompt_price + charge.answer_tokens * self.limits.answer_price

    def _room(self, prompt: int, wanted: int) -> tuple[str, int]:
        """Return (which limit binds, tokens that the answer may have, below 1 where the call does not fit)."""
        if self._ended:
            return "ended", 0
        if self.seconds_left() <= 0:
            return "budget_wall", 0
        limits = self.limits
        if self._steps + len(self._held) >= limits.steps:
            return "budget_steps", 0
        tokens, money = self._left()
        of_tokens, of_money = tokens - prompt, wanted
        if limits.money_millionths and (limits.prompt_price or limits.answer_price):
            money -= prompt * limits.prompt_price
            of_money = money // limits.answer_price if limits.answer_price else (wanted if money >= 0 else 0)
        kind = "budget_tokens" if of_tokens <= of_money else "budget_money"
        return kind, min(wanted, of_tokens, of_money)

    def _left(self) -> tuple[int, int]:
        """Tokens, and millionths of a millionth of the currency, that are neither charged nor reserved."""
        taken = [Charge(self._prompt, self._answer), *self._held]
        tokens = self.limits.tokens - sum(each.tokens for each in taken)
        return tokens, self.limits.money_millionths * MILLION - sum(map(self._price, taken))

    def _words(self, kind: str, prompt: int) -> str:
        limits = self.limits
        return {
            "budget_steps": f"all {limits.steps} calls are made",
            "budget_tokens": f"of {limits.tokens} tokens {self._prompt + self._answer} are used, and the prompt may have {prompt}",
            "budget_money": f"the budget is {limits.money_millionths} millionths, and the call may cost more than what is left",
            "budget_wall": f"the {limits.wall_seconds:g} s of wall time are over",
        }[kind]


def charge_of(answer: bytes, reserved: Charge) -> Charge:
    """Return the tokens of an answered call by its `usage`, or what was reserved where that is absent or impossible.

    An answer's tokens are the most that `completion_tokens`, `total_tokens` without the prompt, and the reasoning tokens say, because
    providers differ in where they count reasoning. Impossible are negative numbers, no prompt tokens, and no tokens for an answer that
    holds something. Prompt and answer are believed apart from one another.
    """
    try:
        envelope = strict_json.read(answer)
    except strict_json.BadJson:
        return reserved
    usage = envelope.get("usage") if isinstance(envelope, dict) else None
    if not isinstance(usage, dict):
        return reserved
    prompt, completion, total = (
        _count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    )
    details = usage.get("completion_tokens_details")
    reasoning = _count(details.get("reasoning_tokens")) if isinstance(details, dict) else None
    known = [completion, reasoning, total - prompt if total is not None and prompt is not None else None]
    counted = max((each for each in known if each is not None), default=-1)
    is_said = completion is not None and (counted > 0 or (counted == 0 and not _holds_something(envelope)))
    return Charge(
        prompt if prompt else reserved.prompt_tokens,
        counted if is_said else max(counted, reserved.answer_tokens),
        not (prompt and is_said),
    )


def _count(value: Any) -> int | None:
    """A count of tokens, None for what is none."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return min(value, MOST_TOKENS) if is_count else None


def _holds_something(envelope: Mapping[str, Any]) -> bool:
    """Whether any choice has a text, a call or reasoning."""
    choices = envelope.get("choices")
    for choice in choices if isinstance(choices, list) else []:
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(message, dict) or any(value for name, value in message.items() if name != "role"):
            return True
    return False
