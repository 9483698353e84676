"""Independent tasks over Ray or in this process: what each finds is kept at once, and the same command goes on.

For work of seconds to minutes that needs nothing of any other: models trained without some sequences, say. Nothing of
it holds a worker of the pool: each task is one process's for as long as it runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np

from raylux.engine.local import Threads
from raylux.engine.progress import Reporter
from raylux.errors import RayluxError, UserError
from raylux.store import DamagedError, RunFolder

# A task whose process or node dies is run again so often: one that ends its process each time is no accident.
_TRIES = 3
# Tasks that Ray is told of at once: more than any cluster has cores, so that an autoscaler sees what there is to do.
_AHEAD = 1000
# Between two looks a driver can be interrupted.
_POLL = 5.0

Values = np.ndarray
"""What a task finds: float64, of any shape."""
Keep = Callable[[str, Values], None]


def run_tasks(
    folder: RunFolder,
    stage: str,
    function: Callable[..., Values],
    shared: Any,
    jobs: Mapping[str, Sequence[Any]],
    *,
    reporter: Reporter,
    what: str = "tasks",
    backend: str = "ray",
    threads: int = 1,
    gpu: bool = False,
    patience: float = 600.0,
) -> dict[str, Values]:
    """``function(shared, *arguments)`` of each job: found in the folder's ledger, or run and put there.

    A unit of the ledger holds what one task found, written whole by the driver. One that is damaged is run again.
    Over Ray a task whose process or node dies is run again by itself.

    Args:
        folder: where results go; need not be a run. Other settings want another folder, or another ``stage``.
        stage: of the ledger, and of the progress that is shown.
        function: of a module that workers can import; its values must depend on its arguments alone.
        shared: what all tasks need, sent once to each node.
        jobs: name of each -> its own arguments.
        reporter: told of the progress, with the time left.
        what: the tasks are called, in the plural.
        backend: ``ray``: on the cluster of RAY_ADDRESS, or on one that is started here; ``local``: one after the other.
        threads: of torch, and CPUs, of each.
        gpu: each needs one.
        patience: seconds without a result after which a cluster that has room for none is given up.

    Returns:
        What each found, float64, in the order of ``jobs``.

    Raises:
        UserError: there is no cluster, or none that could ever run one.
        RayluxError: a task ended its process again and again, or raised one itself.
    """
    known = _known(folder, stage, jobs, reporter)
    todo = {name: tuple(arguments) for name, arguments in jobs.items() if name not in known}
    if todo:
        with reporter.task(stage, len(jobs), what) as task:
            task.go_on(len(jobs) - len(todo))

            def keep(name: str, values: Values) -> None:
                known[name] = np.asarray(values, np.float64)
                folder.commit(stage, name, values=known[name].ravel().tolist(), shape=list(known[name].shape))
                task.advance()

            if backend == "local":
                with Threads(threads):
                    for name, arguments in todo.items():
                        keep(name, function(shared, *arguments))
            else:
                _run(function, shared, todo, keep, stage, {"CPU": threads, "GPU": int(gpu)}, patience)
    return {name: known[name] for name in jobs}


@contextmanager
def cluster(backend: str) -> Iterator[None]:
    """One cluster for several stretches of work: what is started here ends with the block; ``local``: none."""
    if backend == "local":
        yield
        return
    # As the engine does: a process that knows of Ray before of its token does not use one.
    from raylux.engine import session

    started = session.connect()
    try:
        yield
    finally:
        if started:
            session.leave()


def _known(folder: RunFolder, stage: str, jobs: Mapping[str, Any], reporter: Reporter) -> dict[str, Values]:
    found = {}
    for name in folder.committed(stage) & jobs.keys():
        try:
            meta = folder.manifest(stage, name).meta
        except DamagedError as error:
            reporter.say(f"{stage}: '{name}' is done again ({error})")
            continue
        found[name] = np.array(meta["values"], np.float64).reshape(meta["shape"])
    return found


def _run(
    function: Callable[..., Values],
    shared: Any,
    todo: Mapping[str, tuple[Any, ...]],
    keep: Keep,
    stage: str,
    needs: Mapping[str, int],
    patience: float,
) -> None:
    with cluster("ray"):
        import ray

        from raylux.engine.remote import supply

        task = ray.remote(_alone).options(
            num_cpus=needs["CPU"], num_gpus=needs["GPU"], max_retries=_TRIES, name=f"{stage}.{function.__name__}"
        )
        given, waiting, running = ray.put(shared), iter(todo.items()), {}

        def start(count: int) -> None:
            for name, arguments in islice(waiting, count):
                running[task.remote(function, needs["CPU"], given, *arguments)] = name

        try:
            start(_AHEAD)
            moved = time.monotonic()
            while running:
                ready, _ = ray.wait(list(running), num_returns=1, timeout=_POLL)
                lacking = [name for name, count in needs.items() if ray.cluster_resources().get(name, 0) < count]
                if not ready and lacking and time.monotonic() - moved > patience:
                    wanted = f"{needs[lacking[0]]} {lacking[0]}s"
                    raise UserError(
                        f"{stage}: each of the tasks wants {wanted}, the cluster has not so many: {supply()}"
                    )
                moved = time.monotonic() if ready else moved
                for ref in ready:
                    name = running.pop(ref)
                    keep(name, _value(ref, name, stage))
                start(len(ready))
        finally:
            for ref in running:
                ray.cancel(ref, force=True)


def _alone(function: Callable[..., Values], threads: int, shared: Any, *arguments: Any) -> Values:
    """In a process of Ray's: with as many threads as in the driver's, for they change bits."""
    with Threads(threads):
        return function(shared, *arguments)


def _value(ref: Any, name: str, stage: str) -> Values:
    import ray
    from ray.exceptions import RayError, RayTaskError

    from raylux.engine.remote import first_line

    try:
        found: Values = ray.get(ref)
        return found
    except RayTaskError as error:
        if isinstance(error.cause, RayluxError):
            raise error.cause from None
        raise
    except RayError as error:
        raise RayluxError(
            f"{stage}: '{name}' died each of {1 + _TRIES} times ({first_line(error)}); "
            "what is done is kept: run the same command again"
        ) from None
