"""All stages of a config, as a Ray job runs them: ``python jobs/attribute.py CONFIG [section.key=value …]``."""

from __future__ import annotations

import sys

from raylux.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
