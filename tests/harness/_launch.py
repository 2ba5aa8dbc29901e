"""
Become another program that the kernel kills once the process that asked for it is gone.

Run as `python -I -S _launch.py PARENT_PID PROGRAM ARGUMENT...`. The process keeps its id: it marks
itself, then replaces itself. A file of its own, because code between fork and exec in a process
with threads (`preexec_fn`) may deadlock.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Mark this process, make sure the parent still lives, and become the program."""
    parent, program = int(arguments[0]), arguments[1]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        sys.exit("The process that asked for this program is gone already")
    os.execvp(program, arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
