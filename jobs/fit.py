"""The curvature of a config, as a Ray job fits it: ``python jobs/fit.py CONFIG [section.key=value …]``."""

from __future__ import annotations

import sys

from raylux.cli import main

if __name__ == "__main__":
    sys.exit(main(["fit", *sys.argv[1:]]))
