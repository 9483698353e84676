"""raylux beside kronfluence on fixed workloads: time by stage in bare passes, memory, and whether scores agree.

    python jobs/benchmark.py --write                  # workloads A, B, S (and C, where its packages are installed)
    python jobs/benchmark.py --quick                  # A with 8 queries, one round
    python jobs/benchmark.py --workloads A --ray      # and Ray against in process, 2 workers against 1

`--json FILE` keeps what was measured; `--from FILE` starts from such a file: a page can be made of several runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from jobs import pages
from jobs.bench import page
from jobs.bench.found import Found, compare
from jobs.bench.records import KRONFLUENCE, RAYLUX
from jobs.bench.rounds import Choice, plan, take_all
from jobs.bench.workloads import WORKLOADS
from raylux.engine import numerics
from raylux.errors import RayluxError, UserError

USUAL = "A,B,S,C"


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--workloads", default=None, help=f"of {', '.join(WORKLOADS)}; default: {USUAL}")
    found.add_argument("--programs", default=f"{RAYLUX},{KRONFLUENCE}", help="to measure")
    found.add_argument("--sizes", default="", help="numbers of queries; default: by workload")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--threads", type=int, default=2, help="CPU seconds in F are steadier with 1")
    found.add_argument("--bare", type=int, default=2, help="bare passes before a measurement, and as many after")
    found.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="section.key=value for raylux")
    found.add_argument("--quick", action="store_true", help="A, 8 queries, one round, scores not compared")
    found.add_argument("--ray", action="store_true", help="also Ray against in process, on the first workload")
    found.add_argument("--only-ray", action="store_true", help="nothing but that")
    found.add_argument("--folder", type=Path, default=None, help="keep run folders here; default: a temporary one")
    found.add_argument("--from", dest="earlier", type=Path, default=None, help="a file of --json to add to")
    found.add_argument("--json", type=Path, default=None, help="write what was measured")
    found.add_argument("--write", action="store_true", help="write docs/results/benchmark.md and .png")
    return found


def choice_of(options: argparse.Namespace) -> Choice:
    """The options as a choice.

    Raises:
        UserError: a name is unknown, or a number does not fit.
    """
    sizes, programs = _numbers(options.sizes), _programs(options.programs)
    if min(options.rounds, options.threads, options.bare) < 1:
        raise UserError("--rounds, --threads and --bare are at least 1")
    overrides = tuple(options.set)
    if options.quick:
        return Choice(("A",), programs, sizes or (8,), 1, options.threads, 1, overrides, quick=True)
    # Last: it builds what the cache does not have.
    workloads, ray = _workloads(options.workloads), options.ray or options.only_ray
    return Choice(workloads, programs, sizes, options.rounds, options.threads, options.bare, overrides, ray=ray)


def _numbers(text: str) -> tuple[int, ...]:
    parts = [part for part in text.split(",") if part]
    if any(not part.strip().isdigit() or int(part) < 1 for part in parts):
        raise UserError(f"--sizes '{text}': write numbers of queries, as in 8,32")
    return tuple(dict.fromkeys(map(int, parts)))


def _programs(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in (RAYLUX, KRONFLUENCE)]
    if unknown:
        raise UserError(f"--programs: unknown program '{unknown[0]}'; known: {RAYLUX}, {KRONFLUENCE}")
    return names


def _workloads(text: str | None) -> tuple[str, ...]:
    names = (text or USUAL).split(",")
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown:
        raise UserError(f"--workloads: unknown workload '{unknown[0]}'; known: {', '.join(WORKLOADS)}")
    there = []
    for name in names:
        try:
            WORKLOADS[name].prepare()
            there.append(name)
        except UserError as error:
            if text is not None:
                raise
            say(str(error))
    return tuple(there)


def machine(threads: int) -> str:
    """The machine in words."""
    import torch

    device = numerics.here("cpu")["device"]
    extras = [
        name
        for name, test in (("AVX512-BF16", "_is_avx512_bf16_supported"), ("AMX", "_is_amx_tile_supported"))
        if getattr(torch.cpu, test, bool)()
    ]
    halves = f"bf16 by {' and '.join(extras)}" if extras else "no bf16 instructions"
    return f"{os.cpu_count()} cores, {device}, {halves}; torch {torch.__version__}, {threads} thread(s)"


def say(text: str) -> None:
    """To the terminal, at once."""
    print(text, file=sys.stderr, flush=True)


def run(options: argparse.Namespace, command: str) -> Found:
    """Take the measurements; with ``--from``, beside earlier ones."""
    choice = choice_of(options)
    requests = [x for x in plan(choice) if x.purpose == "ray" or not options.only_ray]
    with contextlib.ExitStack() as stack:
        base = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raylux-benchmark-")))
        taken = take_all(requests, base, say)
    # Where the measurements are kept is nobody's business.
    command = re.sub(r" --(json|from|folder)[ =]\S+", "", command)
    found = Found(command, machine(choice.threads), [(request, run) for request, run, _ in taken], compare(taken))
    return Found.open(options.earlier).joined(found) if options.earlier else found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write what was asked for."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    try:
        found = run(options, " ".join(["python jobs/benchmark.py", *given]))
        if options.json:
            found.save(options.json)
        print(page.page(found))
        if options.write:
            pages.write(page.page(found), "benchmark.md")
            page.plot(found, pages.RESULTS / "benchmark.png")
    except RayluxError as error:
        say(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
