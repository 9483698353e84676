"""``raylux evaluate``: estimators side by side, held against what training without some sequences really does.

The base of a config is a run as any other; ``evaluate`` names what is compared, the tests, and the recipe by which
models are trained. Each estimator is a run folder, each training a unit of the ledger: interrupted at any moment, the
same command goes on, and what another command changes is all that is computed anew.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from raylux.config import Config
from raylux.engine.progress import Reporter
from raylux.engine.tasks import cluster
from raylux.evaluation import estimators, inputs
from raylux.evaluation.bench import Bench, Found
from raylux.evaluation.inputs import Inputs
from raylux.evaluation.judging import TESTS
from raylux.evaluation.outcome import Outcome
from raylux.evaluation.retraining import Retraining
from raylux.shown import plain, redacted
from raylux.store import Lease

__all__ = ["Outcome", "evaluate"]

# In the folder.
TABLE, RECORD, PAGE = "report/evaluate.csv", "report/evaluate.json", "report/index.html"


def evaluate(config: Config, quiet: bool = True) -> Outcome:
    """Run every estimator of a config, train what its tests ask for, and hold one against the other.

    Writes ``evaluate.folder`` alone: ``report/`` has the table (csv), everything (json) and the page (html).

    Args:
        config: with a section ``evaluate``.
        quiet: no progress on the terminal.

    Raises:
        UserError: something that it names cannot be served; another command works in the folder.
        RayluxError: units of an estimator, or a training, failed again and again.
    """
    found = inputs.read(config)
    folder = found.folder
    reporter = Reporter(folder, quiet)
    with Lease.take(folder.files, say=reporter.say) as lease, cluster(config.engine.backend):
        folder.guard = lease.check
        retraining = Retraining(found, reporter)
        model = retraining.scored_model()
        scored = {one.name: estimators.scored(found, one, model, reporter, quiet) for one in found.estimators}
        bench = Bench(found, scored, retraining, Found())
        for test in dict.fromkeys(found.chosen.tests):
            TESTS[test](bench)
        seconds = {name: one.seconds for name, one in scored.items()}
        made = bench.found
        outcome = Outcome(
            folder.path, found.against, _about(found), tuple(made.verdicts), tuple(made.curves), made.notes, seconds
        )
        _write(found, outcome)
    return outcome


def _about(found: Inputs) -> dict[str, str]:
    """What was compared, for people."""
    chosen, model = found.chosen, found.config.model
    about = {
        "model": redacted(model.path) + (", trained here" if chosen.scored == "trained" else ""),
        "corpus": f"{redacted(found.config.corpus.path)}, {len(found.sequences):,} sequences",
        "queries": f"{redacted(found.config.queries.path)}, {len(found.queries):,}",
    }
    for one in found.estimators:
        about[f"estimator {one.name}"] = one.word or " ".join(one.overrides) or "the config as it is"
    if inputs.retrains(chosen) or chosen.scored == "trained":
        start = "random weights" if chosen.start is None else f"the weights of {redacted(chosen.start)}"
        recipe = ", ".join(f"{name} {value:g}" for name, value in asdict(found.recipe).items())
        about["training"] = f"from {start}: {recipe}; seeds {chosen.seed} to {chosen.seed + chosen.seeds - 1}"
    return about


def _write(found: Inputs, outcome: Outcome) -> None:
    from raylux.report.evaluated import render

    files = found.folder.files
    shown = outcome.frame().map(lambda value: plain(value) if isinstance(value, str) else value)
    files.put(TABLE, shown.to_csv(index=False).encode())
    files.put(RECORD, (json.dumps(outcome.record(), indent=1, allow_nan=False) + "\n").encode())
    files.put(PAGE, render(outcome).encode())
