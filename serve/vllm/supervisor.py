"""Run a command that never outlives whoever started it: `supervisor.py FOLDER COMMAND …`.

It stands between a replica and vLLM's server, which has processes of its own: all of them are one
process group. The starter holds the other end of standard input; when that closes, be it because
the starter was killed, the group is ended and FOLDER, where the starter keeps its files, removed.
When the command ends first, so does what it has left running. Exits as the command did.

It imports the standard library alone, and starts at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence

# For ending in good order, before what is left is killed.
GRACE_S = 10.0
# Of Linux's prctl: the signal that a process gets when its parent has ended.
PR_SET_PDEATHSIG = 1


def main(folder: str, command: Sequence[str]) -> int:
    """Returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=_end_with_parent
    )
    ended = os.pidfd_open(child.pid)
    try:
        ready, _, _ = select.select([sys.stdin, ended], [], [])
        left = sys.stdin in ready
    except KeyboardInterrupt:
        left = True
    if left:
        child.terminate()
        select.select([ended], [], [], GRACE_S)
    # As long as the child is not waited for, no other group can have its number.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    code = child.wait()
    if left:
        shutil.rmtree(folder, ignore_errors=True)
    return code if code >= 0 else 128 - code


def _end_with_parent() -> None:
    # Should the supervisor itself be killed.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
