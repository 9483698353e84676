"""A config under examination: what it names is read once, by whichever check asks first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

from raylux import models
from raylux.config import Config
from raylux.corpus import Sequences, build_sequences, labelled
from raylux.curvature import KINDS
from raylux.doctor.finding import OK, Finding, NotChecked
from raylux.engine.capacity import Demand
from raylux.engine.demand import demand_of
from raylux.engine.device import placement_of
from raylux.groups import input_groups
from raylux.layers import Coverage
from raylux.placement import Placement
from raylux.queries import Query, load_queries
from raylux.readers import read_documents

T = TypeVar("T")

# Documents that are read of a corpus: enough to judge its rows and the length of its sequences.
SAMPLE = 256


@dataclass(frozen=True)
class Model:
    """A model without its weights, with its tokenizer."""

    files: models.ModelFiles
    coverage: Coverage
    groups: dict[str, str]
    tokenizer: Any
    vocabulary: int
    context: int | None
    classes: tuple[str, ...] | None


@dataclass(frozen=True)
class Sample:
    """The first documents of a corpus as sequences; ``whole``: there are no others."""

    sequences: Sequences
    documents: int
    whole: bool


class Case:
    """The config and what it names.

    The first access to a part raises what is wrong with it (UserError); each later one raises ``NotChecked``, so
    that one mistake is one finding.
    """

    def __init__(self, path: str, overrides: Sequence[str]) -> None:
        self._path, self._overrides = path, overrides
        self._broken: set[str] = set()

    def check(self) -> Finding:
        """Whether the config can be read."""
        backend = self.config.engine.backend
        where = "on Ray" if backend == "ray" else "in process"
        return Finding("config", OK, f"{self._path}: run folder {self.config.run.folder}, {where}")

    @property
    def config(self) -> Config:
        return self._once("config", lambda: self._config)

    @property
    def model(self) -> Model:
        return self._once("model", lambda: self._model)

    @property
    def queries(self) -> list[Query]:
        return self._once("queries", lambda: self._queries)

    @property
    def sample(self) -> Sample:
        return self._once("corpus", lambda: self._sample)

    @property
    def device(self) -> str:
        """cpu or cuda. Raises UserError where the config asks for a device that is not here."""
        return models.resolve_device(self.config.model.device)

    @property
    def itemsize(self) -> int:
        """Bytes of a number in sums, factors and scores."""
        return 8 if self.config.model.dtype == "float64" else 4

    @property
    def demand(self) -> Demand:
        """What the run asks of this machine, by the engine's own figures."""
        return self.demand_on(self.device)

    def demand_on(self, device: str) -> Demand:
        """What the run asks of machines whose workers have such a device, cpu or cuda."""
        model, config = self.model, self.config
        layers, parameters = model.coverage.tracked, model.coverage.parameters
        return demand_of(
            config.engine, config.model.dtype, device, layers, model.groups, parameters, len(self.queries),
            config.curvature.solver != "direct", config.fit.passes, config.curvature.blocks,
            KINDS[config.curvature.kind].joint, self.placement_on(device), config.curvature.projected,
        )  # fmt: skip

    def placement_on(self, device: str) -> Placement | None:
        """Where workers with such a device have the parts of the model; None: all on that one."""
        return placement_of(self.config, self.model.files, device)

    def lose(self, name: str) -> None:
        """A check found nothing to build on."""
        self._broken.add(name)

    def require(self, name: str) -> None:
        """Raises NotChecked where the check ``name`` found nothing to build on."""
        if name in self._broken:
            raise NotChecked(name)

    def _once(self, name: str, read: Callable[[], T]) -> T:
        self.require(name)
        try:
            return read()
        except NotChecked:
            raise
        except Exception:
            self._broken.add(name)
            raise

    @cached_property
    def _config(self) -> Config:
        return Config.load(self._path, self._overrides)

    @cached_property
    def _model(self) -> Model:
        setting = self.config.model
        files = models.find_model(setting)
        structure = models.load_structure(files, setting.trust_remote_code)
        covered = models.coverage(structure, setting.layers, setting.strict)
        return Model(
            files,
            covered,
            KINDS[self.config.curvature.kind].groups(input_groups(structure, covered.tracked)),
            models.load_tokenizer(files, setting.trust_remote_code),
            models.vocabulary_size(structure.config),
            models.context_length(structure.config),
            models.classes_of(structure),
        )

    @cached_property
    def _queries(self) -> list[Query]:
        model = self.model
        return load_queries(self.config.queries.path, model.tokenizer, model.vocabulary, model.context, model.classes)

    @cached_property
    def _sample(self) -> Sample:
        model = self.model
        setting = labelled(self.config.corpus, model.classes)
        documents = list(islice(read_documents(setting), SAMPLE + 1))
        first = documents[:SAMPLE]
        sequences = build_sequences(first, setting, model.tokenizer, model.vocabulary, model.context, model.classes)
        return Sample(sequences, len(first), whole=len(documents) <= SAMPLE)
