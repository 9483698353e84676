"""Query files that keep arriving, answered from a fitted run, as a Ray job.

    python jobs/query_batch.py RUN --queries FOLDER [--watch --idle SECONDS] [section.key=value …]

RUN and FOLDER are absolute paths that the driver and every worker reach, or URLs.
"""

from __future__ import annotations

import sys

from raylux.cli import main

if __name__ == "__main__":
    sys.exit(main(["batch", *sys.argv[1:]]))
