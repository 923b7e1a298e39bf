"""`python -m sgalign` is the `sgalign` command."""

import sys

from sgalign.commands.main import main

sys.exit(main())
