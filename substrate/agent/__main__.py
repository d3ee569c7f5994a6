"""Entry: work on one arm as a task file of kind `agent` says (docs/contract.md).

    python -P -m substrate.agent [/task/task.json]

It talks to the worker through the socket that the task names, and exits with 0 for every end that it could name, 64 for a wrong task
file, and 65 where the worker broke off.
"""

import sys
from contextlib import suppress
from pathlib import Path

from substrate.agent.loop import FINISHED, Session
from substrate.agent.socket_client import Relay
from substrate.agent.task import read_task
from substrate.interface.command_line import Parser
from substrate.interface.errors import DataError, exit_code_of

ROOT = Path(__file__).resolve().parents[2]
MARGIN_SECONDS = 300  # the worker ends a session at its wall time, and first ends what runs


def main() -> None:
    """Reads the command line and the task, runs the session, and says how it ended."""
    parser = Parser(prog="substrate.agent", description="Work on one arm as a task file says.")
    parser.add_argument("task", type=Path, nargs="?", default=Path("/task/task.json"), help="task file of kind agent")
    task, socket = read_task(parser.parse_args().task)
    relay = Relay(socket, task.budget.wall_seconds + MARGIN_SECONDS)
    ending = Session(task, relay, ROOT).run()
    if ending.outcome != FINISHED:
        with suppress(
            *[DataError] if ending.known else []
        ):  # the worker may be gone, where its own refusal ended the session
            relay.end(ending.outcome, ending.what)
    print(f"{ending.outcome}: {ending.what}")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
