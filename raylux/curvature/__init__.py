"""The curvature G of the training loss and its damped inverse, layer by layer. Torch only.

Layout: a layer's parameters are a matrix [P, M] (outputs, inputs; the bias is the last column). G_l acts on
such matrices. All kinds are *per sequence*: G = (1/N) Σ_i (pseudo-)gradient of sequence i, outer product.
"""

from typing import TYPE_CHECKING

from raylux.curvature.kinds import KINDS, Kind, check_blocks, check_end, check_segment, check_words
from raylux.lazily import on_use

if TYPE_CHECKING:
    from raylux.curvature.covariance import Covariances
    from raylux.curvature.eigenbases import eigenbasis, square_eigenbasis
    from raylux.curvature.moments import Basis, add_second_moment, add_second_moments, rotate
    from raylux.curvature.spectral import Spectral
    from raylux.curvature.statistics import Statistics, weighted
else:
    __getattr__ = on_use(
        __name__,
        covariance="Covariances",
        eigenbases="eigenbasis square_eigenbasis",
        moments="Basis add_second_moment add_second_moments rotate",
        spectral="Spectral",
        statistics="Statistics weighted",
    )

__all__ = [
    "KINDS",
    "Basis",
    "Covariances",
    "Kind",
    "Spectral",
    "Statistics",
    "add_second_moment",
    "add_second_moments",
    "check_blocks",
    "check_end",
    "check_segment",
    "check_words",
    "eigenbasis",
    "rotate",
    "square_eigenbasis",
    "weighted",
]
