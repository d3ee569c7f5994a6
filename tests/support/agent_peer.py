"""The worker's side of an agent's socket, for tests of the loop: a real Unix-socket server with scripted answers and small real tools.

    with Peer(tmp_path, [calls(("read", {"path": "substrate/recipes/rft.py"})), calls(("finish", MANIFEST))]) as peer:
        ended = peer.start()

Chat answers come from a list, in order. The tools act on a dict of files; `run` prints the number of a file's lines, and `train` prints
a loss that follows from the files, so that equal forks give equal outputs.
"""

import hashlib
import json
import os
import re
import socketserver
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tests.support.paths import GOLDEN, ROOT

TASK: dict[str, Any] = json.loads((GOLDEN / "agent_task.json").read_text())
MANIFEST: dict[str, Any] = {
    "hypothesis": "a lower rate at the end helps the cipher",
    "axis": "learning_rate",
    "change": "schedule",
    "summary": "the schedule ends at a tenth",
    "tried": [{"what": "a smoke run", "outcome": "same"}],
    "failed": [],
    "expected_effect": "small_gain",
    "checkpoint": {"choice": "last", "why": "the holdout loss falls to the end"},
    "equivalent_settings": [["recipe.min_lr_ratio", "0.1"]],
}
FILES = {
    "substrate/recipes/rft.py": "class Rft:\n    scale = 1.0\n",
    "substrate/training/schedule.py": "def learning_rates():\n    return [1.0]\n",
}


class Refused(Exception):
    """A failure of a tool or of a chat call: its code, then its sentence."""


def calls(*wanted: tuple[str, Any], text: str | None = None, **envelope: Any) -> str:
    """A chat completion with tool calls, as OpenAI writes it. A call's arguments are an object, or a text as it stands."""
    made = [
        {
            "id": f"call_{place}",
            "type": "function",
            "function": {"name": name, "arguments": given if isinstance(given, str) else json.dumps(given)},
        }
        for place, (name, given) in enumerate(wanted)
    ]
    message = {"role": "assistant", "content": text, **({"tool_calls": made} if made else {})}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if made else "stop"}
    return json.dumps({"choices": [choice | envelope], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})


def _line(reply: dict[str, Any]) -> bytes:
    return json.dumps(reply).encode() + b"\n"


class Tools:
    """The eight tools on a dict of files."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self.files = dict(files)
        self.full_runs = 0

    def carry_out(self, name: str, given: dict[str, Any]) -> str:
        tool = getattr(self, f"_{name}", None)
        if tool is None:
            raise Refused("unknown_tool", f"there is no tool {name}")
        return str(tool(**given))

    def _text(self, path: str) -> str:
        if path not in self.files:
            raise Refused("no_such_file", f"{path} is not in the fork; list its folder")
        return self.files[path]

    def _list(self, path: str) -> str:
        return "\n".join(
            f"file {len(text)} {name}" for name, text in sorted(self.files.items()) if name.startswith(path)
        )

    def _read(self, path: str, first_line: int = 1, num_lines: int = 200) -> str:
        return "\n".join(self._text(path).split("\n")[first_line - 1 : first_line - 1 + num_lines])

    def _search(self, pattern: str, path: str = ".") -> str:
        return "\n".join(name for name, text in sorted(self.files.items()) if re.search(pattern, text))

    def _write(self, path: str, content: str) -> str:
        if not path.startswith("substrate/"):
            raise Refused("closed_path", f"{path} is closed; article 16 names the open paths")
        self.files[path] = content
        return f"{len(content)} characters"

    def _patch(self, path: str, old: str, new: str) -> str:
        if (number := self._text(path).count(old)) != 1:
            raise Refused("no_match" if not number else "many_matches", f"`old` occurs {number} times")
        self.files[path] = self.files[path].replace(old, new)
        return "1 replacement"

    def _run(self, command: str, seconds: int = 60) -> str:
        return f"exit code 0\n{sum(text.count(chr(10)) for text in self.files.values())} lines"

    def _train(self, num_steps: int | None, why: str) -> str:
        broken = [name for name, text in sorted(self.files.items()) if "BROKEN" in text]
        if broken:
            raise Refused("trial_failed", f"crashed: NameError in {broken[0]}")
        self.full_runs += num_steps is None
        return f"loss {hashlib.sha256(repr(sorted(self.files.items())).encode()).digest()[0] / 256:.3f}"

    def _finish(self, **manifest: Any) -> str:
        if not self.full_runs:
            raise Refused("nothing_trained", "no full run has completed; call train with num_steps null")
        return "accepted"


class Peer:
    """A server and the task file that names it. `raw` and `lines` have every line that came, `wrong` what could not be served."""

    def __init__(
        self,
        folder: Path,
        answers: Sequence[str | Refused | bytes],
        *,
        files: Mapping[str, str] = FILES,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """answers: bytes go out as they are, for a peer that breaks the contract."""
        self.tools, self.wrong = Tools(files), list[str]()
        self.raw, self.lines = list[bytes](), list[dict[str, Any]]()
        self._answers = iter(answers)
        self.socket = folder / "s"
        self.task = folder / "task.json"
        content = TASK | {"config": TASK["config"] | dict(config or {}), "paths": {"socket": str(self.socket)}}
        self.task.write_text(json.dumps(content))
        peer = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                peer.raw.append(self.rfile.readline())
                line = json.loads(peer.raw[-1])
                peer.lines.append(line)
                try:
                    reply = peer._serve(line)
                except Refused as refused:
                    reply = _line({"ok": False, "failure": refused.args[0], "what": refused.args[1]})
                except Exception as error:  # the test sees it in `wrong`, in place of a dead thread
                    peer.wrong.append(repr(error))
                    reply = b""
                self.wfile.write(reply)

        self._server = socketserver.ThreadingUnixStreamServer(str(self.socket), Handler)
        self._server.daemon_threads = True

    def _serve(self, line: dict[str, Any]) -> bytes:
        if line["kind"] == "chat":
            answer = next(self._answers)
            if isinstance(answer, Refused):
                raise answer
            return answer if isinstance(answer, bytes) else _line({"ok": True, "answer": answer})
        if line["kind"] == "tool":
            output = self.tools.carry_out(line["name"], line["arguments"])
            return _line({"ok": True, "output": output, "truncated": False})
        return _line({"ok": True})

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def start(self, root: Path = ROOT, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs the loop's real process from an image's root, as a sandbox would, and returns how it ended.

        Without site-packages (-S), because the loop needs the standard library alone.
        """
        return subprocess.run(
            [sys.executable, "-S", "-P", "-m", "substrate.agent", str(self.task)],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(root), **environment},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The lines of one kind, in the order in which they came."""
        return [line for line in self.lines if line["kind"] == kind]

    def last_messages(self) -> list[dict[str, Any]]:
        """The messages of the last request."""
        messages: list[dict[str, Any]] = self.of("chat")[-1]["request"]["messages"]
        return messages
