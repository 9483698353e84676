"""What keeping a fit safe costs: the time in snapshots of running sums and in the ledger, of the time of the fit.

A fit in process on a GPT-2 with random weights (workload A of the benchmarks: 4 layers, d = 256, 5,000 tokens,
sequences of 128), once for each setting of `fit.snapshot`. All times of a ratio are of one run: how busy the machine
is does not matter, as far as that is the same throughout.

    python jobs/snapshot_cost.py --write
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from raylux.api import run_stages
from raylux.config import Config
from raylux.engine.local import LocalBackend
from raylux.engine.pace import Pace
from raylux.engine.shard import FactorShard
from raylux.engine.stages import fit
from raylux.store import RunFolder

PAGE = Path(__file__).parent.parent / "docs" / "results" / "snapshot-cost.md"
VOCABULARY, LENGTH = 5000, 128
WANTED = 0.02


@dataclass
class Clock:
    """Seconds and calls by what they went to; what happens within something named counts there alone."""

    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def on(self, name: str, inner: bool = False) -> Iterator[None]:
        """Time a stretch; ``inner``: a part of others, told apart from them and not taken off."""
        if self._open and not inner:
            yield
            return
        name = f"{name} in {self._open[-1]}" if inner and self._open else name
        self._open += [] if inner else [name]
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun
            self.calls[name] = self.calls.get(name, 0) + 1
            if not inner:
                self._open.pop()

    def around(self, usual: Callable[..., Any], name: str, inner: bool = False) -> Callable[..., Any]:
        """A function that is timed."""

        def timed(*args: Any, **more: Any) -> Any:
            with self.on(name, inner):
                return usual(*args, **more)

        return timed

    def of(self, name: str) -> float:
        return self.seconds.get(name, 0.0)


def measure(config: Config) -> Clock:
    """Run corpus and fit, and say where the time of the fit went."""
    clock, measured, run = Clock(), Pace.measured, LocalBackend.run
    whole = [0.0, 0.0]

    @contextlib.contextmanager
    def snapshot(pace: Pace) -> Iterator[None]:
        with clock.on("snapshots"), measured(pace):
            yield

    def fitted(ctx: Any) -> None:
        begun = time.perf_counter()
        usual(ctx)
        whole[0] += time.perf_counter() - begun

    usual = fit.run
    with contextlib.ExitStack() as stack:
        for owner, name, new in (
            (Pace, "measured", snapshot),
            (RunFolder, "commit", clock.around(RunFolder.commit, "ledger")),
            (FactorShard, "write_covariances", clock.around(FactorShard.write_covariances, "factors")),
            (FactorShard, "write_moments", clock.around(FactorShard.write_moments, "factors")),
            (FactorShard, "decompose", clock.around(FactorShard.decompose, "eigenbases")),
            (LocalBackend, "run", clock.around(run, "units")),
            (os, "fsync", clock.around(os.fsync, "fsync", inner=True)),
        ):
            stack.enter_context(patch.object(owner, name, new))
        stack.enter_context(patch.dict("raylux.api._RUN", {"fit": fitted}))
        run_stages(config, ("corpus",), quiet=True)
        clock.seconds.clear()
        clock.calls.clear()
        run_stages(config, ("fit",), quiet=True)
    clock.seconds["fit"] = whole[0]
    return clock


def inputs(base: Path, sequences: int) -> dict[str, dict[str, Any]]:
    """Write model, tokenizer, corpus and a query; returns the config's sections."""
    torch.manual_seed(0)
    sizes = {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": LENGTH}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(base / "model")
    core = Tokenizer(models.WordLevel({f"w{place}": place for place in range(VOCABULARY)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", eos_token="w0")
    tokenizer.save_pretrained(base / "tokenizer")
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (sequences, LENGTH))
    rows = [{"id": f"s{place}", "input_ids": row.tolist()} for place, row in enumerate(ids)]
    _lines(base / "corpus.jsonl", rows)
    _lines(base / "queries.jsonl", [{"id": "q", "prompt": "w1 w2", "completion": "w3"}])
    return {
        "model": {"path": str(base / "model"), "tokenizer": str(base / "tokenizer"), "device": "cpu"},
        "corpus": {"path": str(base / "corpus.jsonl"), "id": "id", "max_length": LENGTH},
        "queries": {"path": str(base / "queries.jsonl")},
        "engine": {"backend": "local", "threads": 1},
    }


def _lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def share(clock: Clock) -> float:
    """Snapshots and ledger, of the time of the fit."""
    return (clock.of("snapshots") + clock.of("ledger")) / clock.of("fit")


HEADER = (
    "fit.snapshot | fit, s | units, s | snapshots | in them, s | of it fsync, s | commits "
    "| in them, s | of it fsync, s | writing factors, s | snapshots and ledger"
)


def row(setting: str, clock: Clock) -> list[str]:
    """A line of the table."""
    cells = [setting, f"{clock.of('fit'):.1f}", f"{clock.of('units'):.1f}"]
    for name in ("snapshots", "ledger"):
        cells += [str(clock.calls.get(name, 0)), f"{clock.of(name):.3f}", f"{clock.of(f'fsync in {name}'):.3f}"]
    return [*cells, f"{clock.of('factors'):.2f}", f"**{share(clock):.2%}**"]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as Markdown."""
    names = HEADER.split(" | ")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [names, ["---"] * len(names), *rows])


def page(rows: Sequence[Sequence[str]], sequences: int, command: str) -> str:
    """docs/results/snapshot-cost.md."""
    return f"""# What snapshots and the ledger cost

    {command}

A fit in process, one thread, on workload A (GPT-2 with 4 layers, d = 256, {VOCABULARY:,} tokens, random weights), on
{sequences} sequences of {LENGTH} tokens, on a local disk. Snapshots: writing the shards' running sums in float64 (A and
S 71 MB, Λ 17 MB here) and the commit that makes them count. Ledger: every other commit of the fit. Both are timed
within the run whose time they are divided by; writing the factors themselves is what a run is for and not counted.

{table(rows)}

Wanted: ≤ {WANTED:.0%} at the default, `auto`, which spaces snapshots so that they take a hundredth of the time by
their measured cost, and takes the first when that much time has gone by. A commit is one small file, written whole
and synced before it takes its name.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the settings, print the table; 1 where the default takes more than is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=1024)
    parser.add_argument("--settings", nargs="+", default=["auto", "0", "1000000"], help="of fit.snapshot")
    parser.add_argument("--write", action="store_true", help="write the page")
    options = parser.parse_args(arguments)
    rows, shares = [], {}
    with tempfile.TemporaryDirectory(prefix="raylux-snapshots-") as base:
        sections = inputs(Path(base), options.sequences)
        for setting in options.settings:
            run = {"folder": str(Path(base) / f"run-{setting}")}
            clock = measure(Config.parse({**sections, "run": run}, [f"fit.snapshot={setting}"]))
            shares[setting] = share(clock)
            rows.append(row(setting, clock))
            print(table(rows[-1:]), {name: round(value, 3) for name, value in clock.seconds.items()}, sep="\n")
    if options.write:
        given = sys.argv[1:] if arguments is None else arguments
        command = " ".join(["python jobs/snapshot_cost.py", *given])
        PAGE.write_text(page(rows, options.sequences, command), encoding="utf-8")
    return 0 if shares.get("auto", 0.0) <= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
