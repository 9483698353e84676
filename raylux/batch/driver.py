"""The driver of a batch: look, take, answer what waits in as few passes as bits allow, sum up; again and again.

All files that wait and whose queries would meet sequences in the same way in a run of their own (``planned``) are
answered in one pass over the corpus. What decides bits does not depend on company, so each answer has the bits of
``raylux run`` on that file alone. Every step is a commit: a driver that was killed goes on by the same command.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from raylux import prepare
from raylux.batch import views
from raylux.batch.inbox import Inbox
from raylux.engine.context import Context
from raylux.engine.plan import Plan
from raylux.engine.stages import answers, prefilter, query, score
from raylux.engine.stages.answers import AskedFile
from raylux.queries import Query, records_in
from raylux.results import Run

# Seconds between two looks at a file that may still be written.
_SETTLES = 0.5
# Seconds after which a command that does not watch waits no longer for one that keeps changing.
_PATIENCE = 30.0
# Files that wait, of which those of a pass are chosen.
_LOOKED_OVER = 256
_STAGES = ("prefilter", "query", "score")


@dataclass(frozen=True)
class Options:
    """How a batch goes.

    Attributes:
        watch: go on when all is answered, and look again; otherwise end.
        every: seconds between two looks.
        idle: seconds without a new file after which a watch ends; None: it goes on until it is interrupted.
        together: queries that are answered in one pass, at most; a file of more stands alone.
    """

    watch: bool = False
    every: float = 5.0
    idle: float | None = None
    together: int = 64


@dataclass
class Outcome:
    """What a command of a batch did.

    Attributes:
        answered: files that this command answered, in order.
        aside: file -> why it was put aside, of all that are in the folder now.
        passes: over the corpus.
    """

    answered: list[str] = field(default_factory=list)
    aside: dict[str, str] = field(default_factory=dict)
    passes: int = 0


def answer_files(
    run: str, queries: str, overrides: Sequence[str] = (), options: Options | None = None, quiet: bool = False
) -> tuple[Run, Outcome]:
    """Answer the query files of a folder from a fitted run, each once.

    Args:
        run: the run folder; its factors must be fitted.
        queries: folder or fsspec prefix in which query files arrive.
        overrides: ``section.key=value`` over the run's own config.
        options: how it goes.
        quiet: no progress on the terminal.

    Raises:
        MissingStageError: the run is not fitted.
        UserError: no such folder; another command works on the run; an input of the run changed.
    """
    with prepare.fitted(run, overrides, quiet) as (base, model):

        def parse(text: str, name: str) -> list[Query]:
            return model.parsed(records_in(text, name), name)

        inbox = Inbox(queries, base.folder, parse, base.reporter)
        batch = Batch(base, inbox, options or Options())
        try:
            batch.run()
        finally:
            batch.close()
        batch.outcome.aside = dict(sorted(batch.aside.items()))
    return Run(run), batch.outcome


class Batch:
    """The loop.

    Args:
        base: the fitted run.
        inbox: where files arrive.
        options: how it goes.
        now, sleep: the clock.
    """

    def __init__(
        self,
        base: Context,
        inbox: Inbox,
        options: Options,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._base, self._inbox, self._options, self._now, self._sleep = base, inbox, options, now, sleep
        self._folder, self._reporter = base.folder, base.reporter
        self._ctx: Context | None = None
        self._run = Run(self._folder.path)
        self._done = {manifest.unit: tuple(manifest.meta["ids"]) for manifest in self._run.answers}
        # Files that this command leaves to another one, and why.
        self._left: dict[str, str] = {}
        self._told: dict[str, int] = {}
        self.outcome = Outcome()

    @property
    def aside(self) -> dict[str, str]:
        """File -> why it is not answered."""
        return {**self._inbox.aside, **self._left}

    def run(self) -> None:
        """Answer what is there; with ``watch``, also what arrives."""
        self._clean()
        views.write_missing(self._run, self._folder)
        since = self._now()
        while True:
            waiting = [name for name in self._inbox.look() if name not in self._done and name not in self._left]
            self._tell(len(waiting))
            if waiting:
                self._pass(waiting)
                since = self._now()
            elif self._inbox.growing and (self._options.watch or self._now() - since < _PATIENCE):
                self._sleep(_SETTLES)
            elif not self._options.watch or self._over(since):
                break
            else:
                self._sleep(self._options.every)
        for name in self._inbox.growing:
            self._leave(name, "is still being written; the same command takes it when it is whole")
        if self._done:
            views.write_page(self._run, self._folder)

    def _leave(self, name: str, reason: str) -> None:
        self._left[name] = reason
        self._reporter.say(f"put aside: {name}: {reason}")

    def close(self) -> None:
        """Give back workers and shards."""
        if self._ctx is not None:
            self._ctx.close()
            self._ctx = None

    def _tell(self, waiting: int) -> None:
        """How many files there are of each kind, where that has changed."""
        now = {"waiting": waiting, "answered": len(self._done), "aside": len(self.aside)}
        if now != self._told:
            self._told = now
            self._reporter.event("batch", state="files", **now)

    def _over(self, since: float) -> bool:
        return self._options.idle is not None and self._now() - since >= self._options.idle

    def _clean(self) -> None:
        """Let go of what answers have taken over: a kill may have come between."""
        answers.let_go(self._folder, [query for ids in self._done.values() for query in ids])

    def _pass(self, waiting: Sequence[str]) -> None:
        """Answer the first file that waits, and with it those that can stand in the same pass."""
        files = self._chosen([self._inbox.taken(name) for name in waiting[:_LOOKED_OVER]])
        if not files:
            return
        ctx = self._ctx
        assert ctx is not None
        _ = ctx.backend  # who counts files on a cluster listens from here on
        self._told = {}
        self._tell(len(waiting))
        ctx.apart = tuple(file.ids for file in files)
        ctx.queries = [asked for file in files for asked in file.queries]
        for stage in (prefilter, query, score):
            stage.run(ctx)
        for file in files:
            answers.keep(ctx, file)
            self._done[file.name] = file.ids
            self._reporter.event("batch", state="answered", file=file.name, queries=len(file.queries))
        self._clean()
        self.outcome.passes += 1
        self.outcome.answered += [file.name for file in files]
        names = ", ".join(file.name for file in files)
        self._reporter.say(f"answered: {names} ({len(ctx.queries)} queries in one pass)")
        self._run = self._run.refreshed()
        views.write_missing(self._run, self._folder)
        views.write_summary(self._run, self._folder)

    def _chosen(self, files: Sequence[AskedFile]) -> list[AskedFile]:
        """Files of one pass, in their order: of the first one's plan, and as many queries as workers are sized for."""
        first = files[0]
        plan = prepare.planned(self._base, len(first.queries))
        room = self._room(plan, len(first.queries))
        if not room:
            count = len(first.queries)
            self._leave(first.name, f"its {count} queries need more memory than there is; part it, or give more memory")
            return []
        chosen, held = [first], len(first.queries)
        for file in files[1:]:
            alike = prepare.planned(self._base, len(file.queries)) == plan
            if alike and held + len(file.queries) <= room:
                chosen.append(file)
                held += len(file.queries)
        return chosen

    def _room(self, plan: Plan, queries: int) -> int:
        """Queries that a pass may have; workers are started anew where they are of another plan or sized for fewer.

        0: not even those of this file can be held.
        """
        ctx = self._ctx
        if ctx is None or ctx.plan != plan or ctx.holds < queries:
            self.close()
            self._ctx = ctx = replace(self._base, plan=plan)
            ctx.stages = _STAGES
            room = ctx.room(max(1, self._options.together))
            # A file that is larger than a pass stands alone, if it fits at all. Where no query does, or no node has
            # come yet, starting the workers waits or says what is lacking.
            if room < queries:
                room = queries if not room or ctx.fitting(queries) else 0
            ctx.holds = room
        return ctx.holds
