"""``python -m raylux.cli`` is the ``raylux`` command."""

import sys

from raylux.cli import main

sys.exit(main())
