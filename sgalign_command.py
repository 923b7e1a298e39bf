"""The entry point of the `sgalign` command.

It lies outside the package because importing the package imports torch, and OpenMP reads its settings when torch is
loaded.
"""

import os

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # each decides how OpenMP's threads wait


def wait_passively() -> bool:
    """Set OpenMP's threads to sleep while they wait, and return True unless the user has already chosen how they wait.

    By default, OpenMP's threads spin while they wait for each other. If other programs use the same cores, each thread
    then often holds a core that the thread it waits for needs.
    """
    if any(name in os.environ for name in WAITING):
        return False
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    return True


def main() -> int:
    """Run the command line and return its exit code."""
    wait_passively()
    from sgalign.commands.main import main

    return main()
