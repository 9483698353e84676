"""What influence is judged by: effects that are measured on the model itself. No Ray, no files."""

from typing import TYPE_CHECKING

from raylux.evaluate.datamodel import Estimate, Judgement, ceiling, compare, correlations, judge, mean_of_each
from raylux.evaluate.doses import Doses, Effect, Measured, Questions, effect, measure
from raylux.evaluate.retrieval import Detection, detection, ranked, recall, reciprocal_ranks
from raylux.evaluate.sizes import Agreement, agreement, slope, whole
from raylux.lazily import on_use

if TYPE_CHECKING:
    from raylux.evaluate.proximal import Optimum, ProximalObjective
    from raylux.evaluate.training import Answers, Proximity, Recipe, train
else:
    __getattr__ = on_use(__name__, proximal="Optimum ProximalObjective", training="Answers Proximity Recipe train")

__all__ = [
    "Agreement",
    "Answers",
    "Detection",
    "Doses",
    "Effect",
    "Estimate",
    "Judgement",
    "Measured",
    "Optimum",
    "ProximalObjective",
    "Proximity",
    "Questions",
    "Recipe",
    "agreement",
    "ceiling",
    "compare",
    "correlations",
    "detection",
    "effect",
    "judge",
    "mean_of_each",
    "measure",
    "ranked",
    "recall",
    "reciprocal_ranks",
    "slope",
    "train",
    "whole",
]
