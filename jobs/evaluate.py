"""An evaluation of estimators, as a Ray job runs it: ``python jobs/evaluate.py CONFIG [section.key=value …]``."""

from __future__ import annotations

import sys

from raylux.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
