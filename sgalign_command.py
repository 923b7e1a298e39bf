"""The entry point of the `sgalign` command.

It lies outside the package because importing the package imports torch, and OpenMP reads its settings when torch is
loaded.
"""

import io
import os
import signal
import sys

WAIT_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # each decides how the threads of GNU's OpenMP wait
SPINS = "10000"  # turns of the loop in which a thread waits before it sleeps (docs/training.md has the measurements)


def shorten_spinning() -> bool:
    """Let OpenMP's threads sleep sooner while they wait. Return False if the user has chosen how they wait.

    By default, the threads of GNU's OpenMP spin for milliseconds while they wait for each other. If other programs use
    the same cores, a spinning thread may occupy the core that the other thread needs.
    """
    if any(os.environ.get(name) for name in WAIT_SETTINGS):
        return False
    os.environ["GOMP_SPINCOUNT"] = SPINS
    return True


def main() -> int:
    """Run the command line in a process that ends afterwards, and return the exit code of `run`."""
    try:
        return run()
    finally:
        # Python may need a second to end. If Ctrl-C ended the process then, Python would print a traceback.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def run() -> int:
    """Run the command line and return its exit code. It is 130 after Ctrl-C."""
    shorten_spinning()
    # The name of a file may have bytes or characters that the terminal's encoding lacks.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        from sgalign.commands import main as command_line

        code = command_line.main()
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # the reader of the output has ended, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python writes at its end
            return 141
        raise  # of another pipe
    except (KeyboardInterrupt, SystemExit) as end:
        # After Ctrl-C, Lightning raises SystemExit with the code 1.
        if isinstance(end, SystemExit) and not (end.code == 1 and isinstance(end.__context__, KeyboardInterrupt)):
            raise
        print("sgalign: interrupted", file=sys.stderr)
        return 130
