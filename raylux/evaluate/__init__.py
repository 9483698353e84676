"""What influence is judged by: effects that are measured on the model itself. No Ray, no files."""

from raylux.evaluate.datamodel import Estimate, Judgement, correlations, judge
from raylux.evaluate.doses import Doses, Effect, Measured, Questions, effect, measure
from raylux.evaluate.proximal import Optimum, ProximalObjective
from raylux.evaluate.sizes import Agreement, agreement, slope, whole

__all__ = [
    "Agreement",
    "Doses",
    "Effect",
    "Estimate",
    "Judgement",
    "Measured",
    "Optimum",
    "ProximalObjective",
    "Questions",
    "agreement",
    "correlations",
    "effect",
    "judge",
    "measure",
    "slope",
    "whole",
]
