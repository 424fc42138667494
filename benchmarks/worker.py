"""A process that is asked one thing after the other, and may hang or die over it: both ends. Standard library only."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

MARK = "@ "  # begins an answer among whatever else the process prints
KILLING = 5.0  # seconds that a killed process has to be gone


class WorkerError(Exception):
    """Why there is no answer, for a table: "hung", "died of SIGSEGV"."""


class Worker:
    """The process, seen by who asks. It stays in the process group of who started it, so as to be ended with it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=None if environment is None else {**os.environ, **environment},
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._output, selectors.EVENT_READ)
        self._read = b""

    def ask(self, question: Any, seconds: float) -> Any:
        """The answer, as :meth:`send` and :meth:`answer` have it."""
        self.send(question)
        return self.answer(seconds)

    def send(self, question: Any) -> None:
        """A question whose answer is fetched later.

        Raises:
            WorkerError: the process is gone.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None

    def answer(self, seconds: float) -> Any:
        """The next one, as the first, which nobody asks for. Other lines are printed.

        Raises:
            WorkerError: there was none within that time, or the process died; either way it is gone.
        """
        until = time.monotonic() + seconds
        while True:
            line, newline, rest = self._read.partition(b"\n")
            if newline:
                self._read, text = rest, line.decode(errors="replace")
                if text.startswith(MARK):
                    return json.loads(text.removeprefix(MARK))
                print(text, flush=True)
                continue
            if not self._selector.select(max(until - time.monotonic(), 0.0)):
                self.stop()
                raise WorkerError("hung")
            more = os.read(self._output.fileno(), 1 << 16)
            if not more:
                raise self._died()
            self._read += more

    def stop(self) -> None:
        """Ends the process, whatever it is at."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # inside a driver it may never end
            self._process.wait(KILLING)
        self._selector.close()
        for pipe in (self._process.stdin, self._output):
            with suppress(BrokenPipeError):  # of what was still to be written
                if pipe is not None:
                    pipe.close()

    def _died(self) -> WorkerError:
        try:
            code = self._process.wait(KILLING)
        except subprocess.TimeoutExpired:  # its output is closed, it is not
            code = -signal.SIGKILL
        self.stop()
        return WorkerError(f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}")


def serve(first: Any, answer: Callable[[Any], Any]) -> None:
    """What the process itself does: says ``first``, then answers each question until there are no more."""
    _say(first)
    for line in sys.stdin:
        _say(answer(json.loads(line)))


def _say(value: Any) -> None:
    print(f"{MARK}{json.dumps(value)}", flush=True)
