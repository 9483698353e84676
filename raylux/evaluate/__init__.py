"""What influence is judged by: effects that are measured on the model itself. No Ray, no files."""

from raylux.evaluate.datamodel import Estimate, Judgement, correlations, judge
from raylux.evaluate.proximal import Optimum, ProximalObjective

__all__ = ["Estimate", "Judgement", "Optimum", "ProximalObjective", "correlations", "judge"]
