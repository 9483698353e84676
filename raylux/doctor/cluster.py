"""Ray: the token that keeps others out, the cluster's answer, and a run's demand against its resources."""

from __future__ import annotations

import os

from raylux.cost.workload import ITEMSIZE
from raylux.doctor.case import Case
from raylux.doctor.finding import FAIL, OK, WARN, Finding
from raylux.engine.auth import ADDRESS, MODE, TOKEN, TOKEN_PATH, Auth, look
from raylux.engine.capacity import Demand, settled
from raylux.engine.demand import check_memory_here, settled_here
from raylux.engine.plan import GIB
from raylux.engine.probe import Answer, ask
from raylux.shown import plain

# Ray explains itself at length.
_LINE = 300
_HOW = f"set {MODE}=token and {TOKEN_PATH}=FILE (or {TOKEN}) alike for the cluster, this process and its jobs"


def auth() -> Finding:
    """Whether Ray asks for a token, and whether the token is where it belongs."""
    found = look()
    if found.mode in ("", "token"):
        return _token(found)
    if found.joins:
        return Finding(
            "auth", WARN, f"{MODE}={found.mode}: whoever reaches the cluster's ports can run code there", _HOW
        )
    detail = f"{MODE}={found.mode}: whoever reaches this machine's ports could run code in the cluster started here"
    return Finding("auth", FAIL, detail, f"unset {MODE}, or set it to token")


def _token(found: Auth) -> Finding:
    if found.joins and not found.mode:  # Ray itself asks for it only where it starts the cluster
        detail = f"{ADDRESS} is set and {MODE} is not: a cluster that asks for a token turns this process away"
        return Finding("auth", WARN, detail, _HOW)
    mode = "token" if found.mode else "token (the default for a cluster started here)"
    if found.in_environment:
        return Finding("auth", OK, f"mode {mode}, token in {TOKEN}")
    if not found.filled:
        if found.mode and (found.joins or os.environ.get(TOKEN_PATH)):
            return Finding("auth", FAIL, f"mode {mode}, but {found.file} holds no token", _HOW)
        return Finding("auth", OK, f"mode {mode}; a token will be made in {found.file}")
    if not found.private:
        detail = f"mode {mode}, but others may read the token in {found.file}"
        return Finding("auth", FAIL, detail, f"chmod 600 {found.file}")
    return Finding("auth", OK, f"mode {mode}, token in {found.file}, private")


def address(case: Case | None) -> Finding:
    """Where Ray is. A cluster that is named must answer; without a name nothing is started for this line."""
    where = os.environ.get(ADDRESS)
    if case is not None and case.config.engine.backend == "local":
        return Finding("ray", OK, "not used: engine.backend is local")
    if not where:
        return Finding("ray", OK, f"no {ADDRESS}: a cluster will be started on this machine")
    answer = ask()
    if answer.problem:
        if case is not None:
            case.lose("ray")
        advice = f"is the cluster up, and are {ADDRESS}, {MODE} and the token right? Unset {ADDRESS} to run here"
        return Finding("ray", FAIL, f"{ADDRESS}={where}: {plain(answer.problem, _LINE)}", advice)
    return Finding("ray", OK, f"{where}: {_supply(answer)}")


def resources(case: Case) -> Finding:
    """A run's workers, threads and memory against what there is."""
    demand = case.demand
    if case.config.engine.backend == "local":
        check_memory_here(demand)
        demand = settled_here(demand)
        return Finding(
            "resources",
            OK,
            f"in process: {_gib(demand.worker_bytes + demand.shards_bytes)} needed, free{_weights(case)}",
        )
    case.require("ray")
    answer = ask(demand)
    if answer.problem:  # names the way out itself
        return Finding("resources", FAIL, plain(answer.problem, _LINE))
    demand = settled(demand, answer.fit)
    need = answer.workers * demand.worker_bytes + demand.shards_bytes
    detail = (
        f"{answer.workers} workers of {_unit(demand)} and {_gib(demand.worker_bytes)}, {answer.shards} shards of "
        f"{_gib(demand.shards_bytes)} together: {_gib(need)} of {_gib(answer.total('memory'))} on {_supply(answer)}"
        f"{_weights(case)}"
    )
    return Finding("resources", OK, detail)


def _weights(case: Case) -> str:
    """What of the model's weights each device of a worker holds, where that is not simply all of them."""
    placed = case.placement_on(case.device)
    if placed is None:
        return ""
    size = ITEMSIZE[case.config.model.dtype]
    each = ", ".join(f"{_gib(placed.held(device) * size)} on {device}" for device in placed.computing)
    away = sum(part.parameters for part in placed.reads) * size
    return f"; weights of a worker: {each}" + (f", {_gib(away)} read each time they run" if away else "")


def _unit(demand: Demand) -> str:
    gpus = f"{demand.gpus} GPU{'s' * (demand.gpus != 1)}"
    return gpus if demand.gpu else f"{demand.threads} thread{'s' * (demand.threads != 1)}"


def _supply(answer: Answer) -> str:
    gpus, nodes = answer.total("GPU"), len(answer.nodes)
    return f"{nodes} node{'s' * (nodes != 1)}, {answer.total('CPU'):g} CPUs" + (f", {gpus:g} GPUs" if gpus else "")


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"
