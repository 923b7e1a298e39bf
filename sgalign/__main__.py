"""The `sgalign` command, run as `python -m sgalign`."""

import os
import sys

from sgalign_command import main, shorten_spinning

# If another program runs this module, such as a profiler or a notebook, that program must not start again.
options = len(sys.orig_argv) - len(sys.argv) - 1  # number of words before "-m sgalign ..."
is_whole_program = sys.orig_argv[options:] == ["-m", "sgalign", *sys.argv[1:]] and "-m" not in sys.orig_argv[:options]

if is_whole_program and sys.executable and shorten_spinning():
    # Python has imported this package, and with it torch, which has already read the settings of OpenMP. The same
    # process starts again with the new setting. Its workers inherit it.
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
sys.exit(main())
