"""Chaos: a run on three nodes whose workers, shards, nodes and driver are killed, against one that is left alone.

    python -m jobs.chaos --seed 0 --kills 50

At random moments of every stage one of them gets a SIGKILL; the driver is started again by the same command, a node
is replaced. Then factors, preconditioned queries and scores have to equal the undisturbed run bit for bit, and the
ledger has to count each unit once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.faults.cluster import cluster
from jobs.faults.driver import Driver
from jobs.faults.inputs import Work, write_config, write_inputs
from jobs.faults.killer import KINDS, Kill, Killer, enough, quotas, table
from jobs.faults.progress import STAGES, Progress, needed
from jobs.faults.verdict import count, differing, problems
from raylux.api import run
from raylux.config import Config

# Units a worker may have computed, or have in hand, that nobody has added yet.
_IN_FLIGHT = 8


@dataclass(frozen=True)
class Outcome:
    """What a chaos run showed.

    Attributes:
        kills: in their order.
        starts: of the driver.
        needed: stage -> units that the run has.
        computed: stage -> units that this one computed.
        seconds: of the undisturbed run, and of the other with its cluster's start and end.
        arrays: compared.
        differing: names of those whose bits differ.
        problems: of the ledger.
    """

    kills: list[Kill]
    starts: int
    needed: dict[str, int]
    computed: dict[str, int]
    seconds: tuple[float, float]
    arrays: int
    differing: list[str]
    problems: list[str]

    @property
    def allowed(self) -> dict[str, int]:
        """Units that each stage may have computed again: for each kill, those in no snapshot and those in flight."""
        again = dict.fromkeys(STAGES, 0)
        for kill in self.kills:
            again[kill.stage] += kill.at_stake + _IN_FLIGHT
        return again

    @property
    def wasteful(self) -> list[str]:
        """Stages of single units that computed more again than they may."""
        return [
            stage
            for stage in STAGES
            if stage != "query" and self.computed[stage] - self.needed[stage] > self.allowed[stage]
        ]

    @property
    def good(self) -> bool:
        return not (self.differing or self.problems or self.wasteful)


def chaos(seed: int, kills: int, work: Work, base: Path) -> Outcome:
    """Run in process, run on a cluster with kills, compare.

    Args:
        seed: of the kills; that of the inputs is ``work.seed``.
        kills: so many, evenly over the stages, if the stages last.
        work: how much there is to kill.
        base: a folder for the inputs and both runs.

    Raises:
        RuntimeError: the run ends with an error or hangs, or a process is left behind.
    """
    sections = write_inputs(base / "inputs", work)
    usual, killed = base / "undisturbed", base / "killed"
    started = time.monotonic()
    alone = write_config(base / "undisturbed.yaml", sections, usual, backend="local")
    run(Config.load(alone))
    units = needed(usual, work.probes)
    config = write_config(base / "killed.yaml", sections, killed)
    progress = Progress(killed)
    between = time.monotonic()
    with cluster() as there:
        driver = Driver(config, there.env, base / "killed.log")
        killer = Killer(seed, there, driver, progress, quotas(kills), units)
        try:
            killer.run()
        finally:
            driver.kill()
    return Outcome(
        killer.kills,
        driver.starts,
        units,
        {stage: progress.moves(stage) for stage in STAGES},
        (between - started, time.monotonic() - between),
        count(usual),
        differing(killed, usual),
        problems(killed),
    )


def tables(outcome: Outcome) -> str:
    """Kills by stage and kind, and what they cost, in Markdown."""
    by_stage = table(outcome.kills)
    lines = [f"| stage | {' | '.join(KINDS)} | all | units needed | computed | again | allowed |"]
    lines.append("| --- " * (len(KINDS) + 6) + "|")
    for stage in STAGES:
        kinds = [str(by_stage[stage][kind]) for kind in KINDS]
        needed, computed = outcome.needed[stage], outcome.computed[stage]
        allowed = "whole blocks" if stage == "query" else str(outcome.allowed[stage])
        row = [stage, *kinds, str(by_stage[stage].total()), str(needed), str(computed), str(computed - needed), allowed]
        lines.append(f"| {' | '.join(row)} |")
    totals = [str(sum(by_stage[stage][kind] for stage in STAGES)) for kind in KINDS]
    needed, computed = sum(outcome.needed.values()), sum(outcome.computed.values())
    row = ["all", *totals, str(len(outcome.kills)), str(needed), str(computed), str(computed - needed), ""]
    return "\n".join([*lines, f"| {' | '.join(row)} |"])


def summary(outcome: Outcome) -> str:
    """The outcome in lines."""
    recovering = sum(kill.recovering for kill in outcome.kills)
    lines = [
        f"{len(outcome.kills)} kills, {recovering} of them while the run still recovered from the one before; "
        f"the driver was started {outcome.starts} times; {outcome.seconds[1]:.0f} s "
        f"(undisturbed, in process: {outcome.seconds[0]:.0f} s).",
        f"{len(outcome.differing)} of {outcome.arrays} arrays differ in a bit from the undisturbed run"
        + (f": {', '.join(outcome.differing[:5])}" if outcome.differing else "."),
        "The ledger counts each unit once." if not outcome.problems else f"Ledger: {'; '.join(outcome.problems[:5])}",
    ]
    if outcome.wasteful:
        lines.append(f"More was computed again than kills explain: {', '.join(outcome.wasteful)}")
    return "\n".join(lines)


def page(outcome: Outcome, work: Work, command: str) -> str:
    """docs/results/chaos.md."""
    return f"""# Kill anything at any moment

    {command}

A GPT-2 of {work.layers} layers (width {work.width}, weights from the seed) and {work.documents:,} openings of
Wikipedia articles, cut into sequences of up to {work.context} tokens; EK-FAC fitted on {work.fitted:,} of these,
{work.queries} queries, every sequence scored against each. The run is made once in process, undisturbed. Then it is
made on a `ray.cluster_utils.Cluster` of a head without workers and two nodes of one CPU, with a snapshot every
{work.snapshot:g} s, and at seeded moments of each stage a gradient worker, a factor shard, a node (all of it; another
takes its place) or the driver (started again by the same command) gets a SIGKILL. The seed fixes who is hit and after
how many units; which unit that is depends on the machine's pace.

{tables(outcome)}

{summary(outcome)}

- **needed** are the units that there are, **computed** those of the run with kills. For each kill, a pass of the fit
  may repeat what was in no snapshot and what was in flight ({_IN_FLIGHT} units); eigendecompositions and score units
  commit one by one, so only those in flight are lost. A block of queries lives in its shards until it is written: its
  gradients and probes are computed again when one of them dies.
- Compared are all committed arrays: covariances, sampled labels, eigenvalues and eigenvectors, Λ, s_test, scores,
  per-token scores.
- The ledger is held against corpus and config: every pair of sequence and query stands in exactly one score block,
  every query in one block, the sums of the fit count exactly its sequences and tokens, nothing is quarantined, no
  snapshot is left, each object has the size and checksum that its manifest names.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write the page; 1 where the outcome is not good or too few were killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=60, help="so many, evenly over the stages")
    parser.add_argument("--folder", type=Path, help="keep the runs in this new folder; default: a temporary one")
    parser.add_argument("--write", type=Path, help="write the page here, as docs/results/chaos.md")
    options = parser.parse_args(arguments)
    work = Work(seed=options.seed)
    with tempfile.TemporaryDirectory(prefix="raylux-chaos-") as temporary:
        outcome = chaos(options.seed, options.kills, work, options.folder or Path(temporary))
    print(tables(outcome), summary(outcome), sep="\n\n")
    if options.write:
        command = f"python -m jobs.chaos --seed {options.seed} --kills {options.kills} --write docs/results/chaos.md"
        options.write.write_text(page(outcome, work, command), encoding="utf-8")
    return 0 if outcome.good and enough(outcome.kills, options.kills) else 1


if __name__ == "__main__":
    sys.exit(main())
