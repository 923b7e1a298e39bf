"""The entry point of the `sgalign` command.

It lies outside the package because importing the package imports torch, and OpenMP reads its settings when torch is
loaded.
"""

import os

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # each decides how OpenMP's threads wait
SPINS = "10000"  # turns of the loop in which a thread waits before it sleeps (docs/training.md has the measurements)


def shorten_spinning() -> bool:
    """Let OpenMP's threads sleep soon while they wait. Return False if the user has chosen how they wait.

    By default, GNU's OpenMP lets threads spin for milliseconds while they wait for each other. If other programs use
    the same cores, a spinning thread often holds the core that the thread it waits for needs.
    """
    if any(name in os.environ for name in WAITING):
        return False
    os.environ["GOMP_SPINCOUNT"] = SPINS
    return True


def main() -> int:
    """Run the command line and return its exit code."""
    shorten_spinning()
    from sgalign.commands.main import main

    return main()
