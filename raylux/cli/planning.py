"""``raylux plan``: what a run will need and take, before anything runs."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from raylux.cli import output
from raylux.cli.app import ConfigArgument, OverridesArgument, app, manual


@app.command(
    short_help="say what a run needs and takes, before it runs",
    help=manual("""What CONFIG needs and takes, stage by stage: memory, disk, FLOPs, time, device-hours, and why.

    Without --cluster: on this machine, by the choices that the run will freeze and by rates that are measured once
    per host (about a second; kept in $RAYLUX_CACHE). With --cluster: on the machines of a file (configs/clusters/ has
    examples), as far ahead as the cost model of docs/scaling.md goes; what the engine does not do yet is marked.

    A run that cannot work is refused (2), in one line that names the smallest change that would help.

    Needs no weights (a folder with config.json will do), and no corpus or queries where their sizes are given. Writes
    nothing but the cache.

    \b
    Examples:
      raylux plan configs/quickstart.yaml
      raylux plan configs/llama-3-8b.yaml --cluster configs/clusters/h100-8.yaml \\
        --sequences 1000000 --tokens 512 --queries 1000 model.path=configs/models/llama-3-8b
    """),
)
def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", metavar="FILE", help="YAML file of a cluster; default: this machine")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    sequences: Annotated[int | None, typer.Option(min=1, max=10**10, metavar="N", help="of the corpus")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, max=10**7, metavar="N", help="mean length of a sequence")] = None,
    queries: Annotated[int | None, typer.Option(min=1, max=10**7, metavar="N", help="how many are asked")] = None,
    candidates: Annotated[int | None, typer.Option(min=1, max=10**10, metavar="N", help="that are scored")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="measure this machine's rates again")] = False,
) -> None:
    """Print the plan of ``raylux.planning``."""
    from raylux.config import Config

    loaded = Config.load(config, overrides or [])
    from raylux import planning
    from raylux.cost.machine import Cluster
    from raylux.report import plans

    sizes = planning.Sizes(sequences, tokens, queries, candidates)
    if cluster is None:
        found, where = planning.plan_here(loaded, sizes, refresh=calibrate)
    else:
        where = Cluster.load(cluster)
        found = planning.plan_on(loaded, sizes, where)
    if as_json:
        record = {**found.dump(), "cluster": where.model_dump(mode="json")}
        sys.stdout.write(json.dumps(record, indent=1, allow_nan=False) + "\n")
        sys.stdout.flush()
        return
    device = where.device.kind
    title = f"{where.devices} × {device}, {where.device.memory_gb:,.3g} GB each"
    out = output.console()
    out.print(plans.rich_table(title, plans.stage_names(found), plans.stage_rows(found)))
    out.print(plans.rich_table("where the time goes", plans.WORK, plans.work_rows(found)))
    out.print(plans.rich_table("choices", plans.CHOICES, plans.choice_rows(found.choices)))
