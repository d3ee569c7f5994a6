"""One session: asks the model, carries out the tool calls of each answer in order, and goes on until an end.

A session ends by `finish`, by the watchdog, by too many unreadable answers in a row, or by a failure of a request, which the worker has
repeated already where that helps. A failure of a tool is no end: the model is told, and may do something else.
"""

from dataclasses import dataclass
from pathlib import Path

from substrate.agent import conversation, watchdog
from substrate.agent.answers import Answer, BadAnswer, Call, read_answer
from substrate.agent.context import data_of, first_messages, request
from substrate.agent.socket_client import Failure, Relay
from substrate.agent.task import AgentTask
from substrate.agent.tool_schemas import fault_of

FINISHED, MALFORMED = "finished", "malformed"
MOST_BAD_ANSWERS = 4
"""Unreadable answers in a row that end a session. One is chance, and three more each came after a sentence on what was wrong."""
MOST_SQUEEZES = 2
"""How often a session halves its requests because the model's context is smaller than assumed: to a quarter of the first one refused."""
FEW_STEPS = 5
"""Steps left from which on the model is reminded of the end: a full run, two repairs, another run, the report."""
SQUEEZED_BY = "endpoint_context"
NUDGE = "Your answer had no tool call. Go on by calling a tool, or end by calling `finish`."


@dataclass(frozen=True)
class Ending:
    """How a session ended. `outcome` is FINISHED, MALFORMED, watchdog_..., or the code of a failed request."""

    outcome: str
    what: str
    known: bool = False  # whether the worker knows it, because it took the report or refused the request


class Session:
    """The state of one session. `run` is called once."""

    def __init__(self, task: AgentTask, relay: Relay, root: Path) -> None:
        """root: of the pristine image, whose interface the model is told."""
        self._task, self._relay = task, relay
        self._first = first_messages(task, root)
        self._overhead = conversation.num_tokens(request(task, []))
        self._most_tokens = conversation.most_tokens(task.budget, self._overhead + conversation.num_tokens(self._first))
        self._turns: list[conversation.Turn] = []
        self._history: list[list[watchdog.Event]] = []
        self._asked = 0  # requests, and so steps of the budget
        self._bad = 0  # unreadable answers in a row
        self._squeezes = 0
        self._trained = False  # whether a full run has completed
        self._finished = False

    def run(self) -> Ending:
        """Returns how the session ended. Raises DataError if the worker breaks off or breaks the contract."""
        while True:
            messages = conversation.messages(self._first, self._turns, self._most_tokens - self._overhead)
            asked = request(self._task, messages)
            reply = self._relay.chat(asked)
            if isinstance(reply, Failure):
                if reply.code != SQUEEZED_BY or self._squeezes == MOST_SQUEEZES or not self._turns:
                    return Ending(reply.code, reply.what, known=True)
                self._squeezes += 1
                self._most_tokens = conversation.num_tokens(asked) // 2
                continue
            self._asked += 1
            if ending := self._take(reply):
                return ending

    def _take(self, reply: str) -> Ending | None:
        """Carries out one answer; returns the end if it was the last."""
        try:
            answer = read_answer(reply, self._asked)
        except BadAnswer as bad:
            return self._correct(bad)
        replies = self._carry_out(answer)
        if self._finished:
            return Ending(FINISHED, "the report was accepted", known=True)
        verdict = watchdog.judge(self._history)
        if verdict and verdict.ends:
            return Ending(verdict.outcome, verdict.what + _parser_hint(answer))
        if answer.calls:
            replies[-1] = self._remark(replies[-1], verdict)
            self._turns.append(conversation.turn_of(answer, replies))
        else:
            self._turns.append(conversation.turn_of_text(answer.text, self._remark(NUDGE, verdict)))
        return None

    def _correct(self, bad: BadAnswer) -> Ending | None:
        """Tells the model what was wrong with its answer; returns the end if that was often enough."""
        self._bad += 1
        if self._bad == MOST_BAD_ANSWERS:
            return Ending(
                MALFORMED, f"{self._bad} answers in a row could not be carried out; the last: {bad} ({bad.code})"
            )
        correction = self._remark(f"Nothing of your last answer was carried out: {bad}.")
        self._turns.append(conversation.turn_of_text(bad.text, correction))
        return None

    def _carry_out(self, answer: Answer) -> list[str]:
        """Carries out the calls of an answer in order, up to an accepted `finish`; returns a reply to each, and notes what happened."""
        events: list[watchdog.Event] = []
        replies = []
        self._history.append(events)
        for call in answer.calls:
            self._bad = 0
            fault = fault_of(call.name, call.arguments, self._task.arm.axis)
            result = Failure(*fault) if fault else self._relay.tool(call.name, call.arguments)
            carried_out = not isinstance(result, Failure)
            if call.name == "finish" and carried_out:
                self._finished = True
                break
            if call.name == "train" and carried_out and call.arguments["num_steps"] is None:
                self._trained = True
            replies.append(_reply(call, result))
            # A trial that failed was a try all the same; other failures say that nothing was done.
            acted = carried_out or (isinstance(result, Failure) and result.code == "trial_failed")
            events.append(watchdog.Event.of(call.name, call.arguments, replies[-1], carried_out=acted))
        return replies

    def _remark(self, reply: str, verdict: watchdog.Verdict | None = None) -> str:
        """Returns a reply with what the loop itself tells the model: a warning of the watchdog, and the steps that are left."""
        left = max(self._task.budget.steps - self._asked, 0)
        warning = f"Warning: {verdict.what}. Do something else, or the session is ended." if verdict else ""
        urgent = " Call `finish` now." if self._trained else " Make the full run now."
        return "\n".join(filter(None, (reply, warning, f"Steps left: {left}.{urgent if left <= FEW_STEPS else ''}")))


def _reply(call: Call, result: str | Failure) -> str:
    if isinstance(result, Failure):
        # The sentence may hold the end of a log, so it is data as well.
        return f"{call.name} failed ({result.code}).\n{data_of(call.name, result.what)}"
    return data_of(call.name, result)


def _parser_hint(answer: Answer) -> str:
    """Says to a person why no call was found, where the model wrote one into its text."""
    written = any(mark in answer.text for mark in ("<tool_call>", "<function=", "[TOOL_CALLS]", "<|python_tag|>"))
    return (
        "; its text holds calls, so the endpoint's parser of tool calls is missing or the wrong one" if written else ""
    )
