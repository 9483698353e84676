"""What influence is judged by: effects that are measured on the model itself. Torch only."""

from raylux.evaluate.proximal import Optimum, ProximalObjective

__all__ = ["Optimum", "ProximalObjective"]
