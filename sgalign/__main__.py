"""The `sgalign` command, run as `python -m sgalign`."""

import sys

from sgalign.commands.main import main

sys.exit(main())
