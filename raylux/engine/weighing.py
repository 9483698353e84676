"""A gradient worker's part of self-influences: how long the gradients of sequences are in the damped curvature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from raylux import gpu
from raylux.blocks import Square
from raylux.curvature import KINDS
from raylux.curvature.joint import Joint
from raylux.curvature.projected import Projected
from raylux.curvature.squares import (
    COUNT,
    Weighed,
    add_joint_squares,
    add_projected_lengths,
    add_projected_squares,
    add_squares,
)
from raylux.engine.parts import WorkerPart
from raylux.engine.records import Contraction, LoadedCurvature, read_curvature, read_joint, read_projected
from raylux.engine.scorer import Pack, PackPart
from raylux.errors import NumericsError
from raylux.influence.words import are_words
from raylux.layers import TrackedLayer
from raylux.memory import give_back
from raylux.routed import Rows
from raylux.store import RunFolder

Objects = dict[str, tuple[int, str]]
Inputs = Mapping[str, Rows]


class Curvatures:
    """Damped curvatures of some layers, held until others are asked for.

    Each lies where ``devices`` has its layer; what is one for all layers, on ``device``.
    """

    def __init__(
        self,
        folder: RunFolder,
        layers: Sequence[TrackedLayer],
        groups: dict[str, str],
        dtype: torch.dtype,
        devices: Mapping[str, str],
        device: str,
    ) -> None:
        self._folder, self._groups, self._dtype, self._devices = folder, groups, dtype, devices
        self._device = device
        self._shapes = {layer.name: layer.shape for layer in layers}
        self._of: tuple[LoadedCurvature, tuple[str, ...]] | None = None
        self._held: dict[str, Weighed] = {}
        self._joint: tuple[LoadedCurvature, Joint] | None = None
        self._projected: dict[str, Projected] = {}

    def get(self, loaded: LoadedCurvature, names: tuple[str, ...]) -> dict[str, Weighed]:
        """Those of the layers ``names``, read unless they are held.

        Raises:
            NumericsError: λ = 0 where Λ has a zero.
        """
        if self._of != (loaded, names):
            self.drop()
            give_back()
            leaders: dict[str, Square | None] = {}
            for name in names:
                group = self._groups[name]
                curvature = read_curvature(
                    self._folder, loaded.fitted, loaded.kind, name, group, self._dtype, self._devices[name]
                )
                damping = curvature.damping(loaded.damping, loaded.fitted.least.get(name, 0.0))
                try:
                    self._held[name] = curvature, curvature.inverse(damping)
                except NumericsError as error:
                    raise NumericsError(f"layer '{name}': {error}") from None
                curvature.values = None  # 1 / (Λ + λ) stands for it
                # Layers that read the same tensor share one basis of it.
                curvature.q_a = leaders.setdefault(group, curvature.q_a)
            self._of = loaded, names
        return self._held

    def joint(self, loaded: LoadedCurvature) -> Joint:
        """The exact matrix over all layers, read unless it is held.

        Raises:
            NumericsError: it is singular.
        """
        if self._joint is None or self._joint[0] != loaded:
            self.drop()
            self._joint = (
                loaded,
                read_joint(self._folder, loaded.fitted, loaded.kind, self._shapes, loaded.damping, self._device),
            )
        return self._joint[1]

    def projected(self, loaded: LoadedCurvature, names: tuple[str, ...]) -> dict[str, Projected]:
        """The metrics of the layers ``names``, read unless they are held.

        Raises:
            NumericsError: one is singular.
        """
        if self._of != (loaded, names):
            self.drop()
            give_back()
            for name in names:
                device = self._devices[name]
                self._projected[name] = read_projected(
                    self._folder, loaded.fitted, name, loaded.damping, self._dtype, device
                )
            self._of = loaded, names
        return self._projected

    def drop(self) -> None:
        self._held, self._of, self._joint, self._projected = {}, None, None, {}


class SelfInfluences(WorkerPart):
    """Lengths of gradients, self-influences, steps."""

    _curvatures: Curvatures

    def squares_unit(
        self, name: str, rows: np.ndarray, loaded: LoadedCurvature, contraction: Contraction
    ) -> tuple[str, Objects]:
        """Write ``squares`` [3, n] of corpus rows, on their own labels: as ``raylux.curvature.squares`` has them.

        Tokens are those that scores are taken of; the curvature is not rounded (``engine.solve``).

        Args:
            name: the unit's, for the object's key.
            rows: [n] corpus rows.
            loaded: the curvature, in as many passes over the rows as it has parts.
            contraction: how products with sequences are taken.

        Returns:
            The key and the objects of what was written, as ``RunFolder.write``.
        """
        self._release()
        total = np.zeros((COUNT, len(rows)))
        for names in loaded.passes:
            add = self._adder(loaded, names)
            wanted = frozenset(names) if len(loaded.passes) > 1 else None
            for pack in self._packs(rows, contraction, wanted=wanted):
                for part in pack.parts:
                    found = torch.zeros(COUNT, len(part), dtype=torch.float64, device=self.device)
                    add(found, *self._wide(part))
                    total[:, list(part.places)] += gpu.to_host(found[:, : len(part.places)]).numpy()
        if not np.isfinite(total).all():
            bad = rows[~np.isfinite(total).all(0)]
            raise NumericsError(f"unit {name}: NaN or infinity in the self-influence of corpus rows {bad[:5].tolist()}")
        return self.folder.write(f"squares/{name}", {"squares": total})

    def lengths(self, pack: Pack, metric: LoadedCurvature) -> Tensor:
        """What the scores of each row of a pack are divided by [rows] float64, by a kind that projects."""
        metrics = self._curvatures.projected(metric, tuple(name for names in metric.passes for name in names))
        total = [torch.zeros(len(part), dtype=torch.float64, device=self.device) for part in pack.parts]
        for found, part in zip(total, pack.parts, strict=True):
            add_projected_lengths(found, *self._wide(part), self.spec.groups, metrics)
        return torch.cat(total).sqrt()

    def _wide(self, part: PackPart) -> tuple[Inputs, Inputs]:
        """a and g of a batch in the precision of the curvature."""
        inputs, grads = (
            {each: x if are_words(x) else x.to(self.compute) for each, x in found.items()}
            for found in (part.inputs, part.grads)
        )
        return inputs, grads

    def _adder(self, loaded: LoadedCurvature, names: tuple[str, ...]) -> Callable[[Tensor, Inputs, Inputs], None]:
        """What adds the squares in some layers, or in all of them where they have one matrix together."""
        groups = self.spec.groups
        if KINDS[loaded.kind].joint:
            return partial(add_joint_squares, matrix=self._curvatures.joint(loaded), groups=groups)
        if KINDS[loaded.kind].projected:
            return partial(add_projected_squares, metrics=self._curvatures.projected(loaded, names), groups=groups)
        return partial(add_squares, curvatures=self._curvatures.get(loaded, names), groups=groups)
