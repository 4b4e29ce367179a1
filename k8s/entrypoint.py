"""Runs commands one after the other, each if the one before succeeded: `entrypoint.py A a1 --- B b1`.

It is the first process of a container and does what a shell, or an init such as tini, would not: a signal goes to every
process of the running command, because `deepspeed` keeps SIGTERM to itself and leaves its ranks unaware; and the
command counts as ended only when all of them have, because the container dies with its first process, and ranks that
`deepspeed` left behind with it. Exits with the code of the first command that failed, 128 + n if signal n ended it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from types import FrameType

SEPARATOR = "---"
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>: orphans become our children, as they would the first process's


class Runner:
    """The running command's process group, and the signal that asked for the end."""

    def __init__(self) -> None:
        self.group: int | None = None
        self.asked: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.forward)

    def forward(self, number: int, _: FrameType | None) -> None:
        """Passes a signal on to the whole group; without one it is only remembered."""
        self.asked = number
        if self.group is not None:
            try:
                os.killpg(self.group, number)
            except ProcessLookupError:  # its last process left in this moment
                self.group = None

    def run(self, command: list[str]) -> int:
        """The command's exit code, once it and everything it started have ended."""
        if self.asked is not None:
            return 128 + self.asked
        try:
            child = subprocess.Popen(command, process_group=0)
        except OSError as error:
            print(f"{command[0]}: {error.strerror}", file=sys.stderr)
            return 127
        self.group, code = child.pid, 0
        if self.asked is not None:  # it came while the command was starting
            self.forward(self.asked, None)
        while True:
            try:
                pid, status = os.wait()
            except ChildProcessError:
                self.group = None
                return code if code >= 0 else 128 - code
            if pid == child.pid:
                code = child.returncode = os.waitstatus_to_exitcode(status)


def main(arguments: list[str]) -> int:
    """Splits the arguments into commands and runs them."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    runner = Runner()
    commands: list[list[str]] = [[]]
    for argument in arguments:
        if argument == SEPARATOR:
            commands.append([])
        else:
            commands[-1].append(argument)
    if not all(commands):
        print(f"usage: entrypoint.py COMMAND... [{SEPARATOR} COMMAND...]", file=sys.stderr)
        return 2
    return next((code for command in commands if (code := runner.run(command))), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
