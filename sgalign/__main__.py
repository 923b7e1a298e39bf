"""The `sgalign` command, run as `python -m sgalign`."""

import os
import sys

from sgalign_command import main, shorten_spinning

if shorten_spinning():
    # Python has imported this package, and with it torch, which has already read the settings of OpenMP. The same
    # process starts again with the new setting. Its workers inherit it.
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
sys.exit(main())
