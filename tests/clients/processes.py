"""Processes of a test session: their logs in files, their end together with the session."""

import ctypes
import os
import signal
import subprocess
import time

STOP_LIMIT_S = 15
LOOK_EVERY_S = 0.05
TAIL_LINES = 60
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None, use_errno=True)


class Process:
    """A running program in a session of its own; `stop` ends it and all that it started."""

    def __init__(self, name, command, logs, environment=None):
        self.name = name
        self.log = logs / f"{name.replace('/', '-')}.log"
        with open(self.log, "ab") as log:
            self.child = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def check_alive(self):
        status = self.child.poll()
        if status is not None:
            raise AssertionError(f"{self.name} ended with {status}; the end of {self.log}:\n{self.tail()}")

    def tail(self):
        return "\n".join(self.text().splitlines()[-TAIL_LINES:])

    def text(self):
        return self.log.read_text(errors="replace")

    def stop(self):
        """Asks, waits, insists; then nothing of its session is left."""
        if self.child.poll() is None:
            self.child.terminate()
            try:
                self.child.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.child.wait()


def end_with_parent():
    """A session that is killed itself leaves nothing behind."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def until(what, limit_s, look):
    """Looks again and again until `look` gives something true, which it returns."""
    deadline = time.monotonic() + limit_s
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {limit_s} s for {what}; last seen: {found!r}")
        time.sleep(LOOK_EVERY_S)
