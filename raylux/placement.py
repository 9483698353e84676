"""Where the parts of a model lie that is spread over several devices, or read from disk: ``model.device_map``.

A part is what a map may place: a block of the model, that is a member of its list of blocks, or what stands beside the
blocks (embedding, last norm, head). Residual connections go through a block, so it lies in one place. A part of which
a worker's devices hold nothing is read again each time it runs, by the hooks of accelerate, and is let go of after it;
with gradient checkpointing (``raylux.checkpointing``) the backward pass reads it once more instead of holding it.

Nothing here changes a bit: every part is computed by the same operations, on devices of one kind.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from raylux.adapters import has_adapter
from raylux.config import ModelSection
from raylux.errors import UserError, shown
from raylux.experts import SplitExperts
from raylux.modules import features_of

CPU, DISK = "cpu", "disk"
_GPU = re.compile(r"(?:cuda:)?([0-9]{1,4})")


@dataclass(frozen=True)
class Part:
    """What lies in one place.

    Attributes:
        name: of the module; empty: the whole model.
        parameters: of its own, without those that an earlier part has.
        block: whether it is one of the model's blocks.
        tied: the earlier part whose weights it uses too; None: its weights are its own.
    """

    name: str
    parameters: int
    block: bool
    tied: str | None = None


def parts_of(model: nn.Module) -> tuple[Part, ...]:
    """The parts of a model, in its own order; its weights are not read, so a model on the meta device will do."""
    found: list[Part] = []
    owner: dict[int, str] = {}
    for name, module, block in _walk("", model, False):
        own = {id(parameter): parameter.numel() for parameter in module.parameters()}
        tied = next((owner[one] for one in own if one in owner), None)
        fresh = sum(size for one, size in own.items() if one not in owner)
        owner |= {one: name for one in own if one not in owner}
        found.append(Part(name, fresh, block, tied))
    return tuple(found)


def _walk(name: str, module: nn.Module, block: bool) -> list[tuple[str, nn.Module, bool]]:
    lists = any(isinstance(below, nn.ModuleList) for below in module.modules())
    if block or not lists or list(module.parameters(recurse=False)):
        return [(name, module, block)]
    inside = isinstance(module, nn.ModuleList)
    children = [(f"{name}.{leaf}" if name else leaf, child) for leaf, child in module.named_children()]
    return [one for path, child in children for one in _walk(path, child, inside)]


@dataclass(frozen=True)
class Placement:
    """A device for every part.

    Attributes:
        parts: of the model, in its order.
        devices: of each: ``cpu``, ``disk`` or ``cuda:N``, N counted among the worker's own GPUs.
        main: where batches and logits are, and where what is read from elsewhere is computed: ``cpu`` or ``cuda:0``.
        gpus: that a worker has.
    """

    parts: tuple[Part, ...]
    devices: tuple[str, ...]
    main: str
    gpus: int = 1

    @property
    def device_map(self) -> dict[str, int | str]:
        """As transformers and accelerate want it: part -> number of a GPU, or ``cpu``, or ``disk``."""
        pairs = zip(self.parts, self.devices, strict=True)
        return {part.name: int(where[5:]) if where.startswith("cuda:") else where for part, where in pairs}

    @cached_property
    def reads(self) -> tuple[Part, ...]:
        """Parts that are brought to the main device each time they run."""
        return tuple(part for part, where in zip(self.parts, self.devices, strict=True) if self._runs(where) != where)

    @property
    def computing(self) -> tuple[str, ...]:
        """The devices on which something runs, the main one first."""
        return tuple(dict.fromkeys([self.main, *(self._runs(where) for where in self.devices)]))

    def runs_on(self, layer: str) -> str:
        """The device on which a module of the model runs."""
        for part, where in zip(self.parts, self.devices, strict=True):
            if not part.name or layer == part.name or layer.startswith(f"{part.name}."):
                return self._runs(where)
        return self.main

    def blocks_on(self, device: str) -> int:
        """Blocks that run on a device."""
        pairs = zip(self.parts, self.devices, strict=True)
        return sum(part.block and self._runs(where) == device for part, where in pairs)

    def held(self, device: str, graph: bool = False) -> int:
        """Parameters in a device's memory at the peak of a pass.

        Args:
            device: ``cpu``, or ``cuda:N``.
            graph: a pass goes without checkpointing, so that its graph holds all that was read for it.
        """
        own = sum(part.parameters for part, where in zip(self.parts, self.devices, strict=True) if where == device)
        if device != self.main:
            return own
        beside = sum(part.parameters for part in self.reads if graph or not part.block)
        block = 0 if graph else max((part.parameters for part in self.reads if part.block), default=0)
        return own + beside + block

    def _runs(self, where: str) -> str:
        away = where == DISK or (where == CPU and self.main != CPU)
        return self.main if away else where


def placed(
    model: nn.Module, setting: ModelSection, device: str, gpus: int, room: Mapping[str, float] | None = None
) -> Placement | None:
    """What ``model.device_map`` comes to; None: it is not set, and the model lies on the worker's one device.

    Args:
        model: may lie on the meta device; its adapter is on it, its fused experts are taken apart.
        setting: the config's.
        device: of the run: "cpu" or "cuda".
        gpus: of a worker.
        room: parameters that each computing device can hold, for ``auto``; None: all that there are.

    Raises:
        UserError: accelerate is missing, or the map names what is not there, leaves something out or divides what
            belongs together.
    """
    asked = setting.device_map
    if gpus > 1 and device != "cuda":
        raise UserError(f"engine.gpus_per_worker={gpus}, but model.device is {device}: set it to cuda, or use 1")
    if asked is None:
        if gpus > 1:
            raise UserError(
                f"engine.gpus_per_worker={gpus} does nothing by itself: set model.device_map to balanced, auto or a "
                "mapping of modules to devices"
            )
        return None
    if features_of(model) is not None:
        raise UserError("model.device_map: a module in memory lies where it is; leave the key out")
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("model.device_map: spreading a model needs accelerate; pip install 'raylux[devices]'")
    parts, main = parts_of(model), CPU if device == "cpu" else "cuda:0"
    if isinstance(asked, str):
        found = Placement(parts, _balanced(parts, main, gpus), main, gpus)
        found = _within(found, room, gpus) if asked == "auto" and room is not None else found
    else:
        found = Placement(parts, _mapped(model, parts, asked, main, gpus), main, gpus)
    _check_read(model, found)
    return found


def runs(sizes: Sequence[int], count: int) -> list[int]:
    """Which of ``count`` runs, one after the other, each of some sizes is in, so that the largest run is smallest."""

    def cut(sizes: Sequence[int], most: int) -> list[int]:
        numbers, number, filled = [], 0, 0
        for size in sizes:
            if filled + size > most:
                number, filled = number + 1, 0
            filled += size
            numbers.append(number)
        return numbers

    low, high = max(sizes, default=0), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cut(sizes, middle)[-1] < count else (middle + 1, high)
    numbers, number, filled = [], 0, 0
    for place, size in enumerate(sizes):
        left = count - number - 1
        # No run is longer than it has to be, and none much shorter than those that are left.
        enough = filled + size / 2 > (filled + sum(sizes[place:])) / (left + 1)
        if filled + size > low or (enough and left and cut(sizes[place:], low)[-1] < left):
            number, filled = number + 1, 0
        filled += size
        numbers.append(number)
    return numbers


def _balanced(parts: Sequence[Part], main: str, gpus: int) -> tuple[str, ...]:
    """Equal shares of the weights over the worker's GPUs, in the model's order; tied weights in one place.

    accelerate's own balance asks the GPUs that are there; this one says the same of a worker that is only planned.
    """
    if main == CPU:
        return (CPU,) * len(parts)
    numbers = runs([part.parameters for part in parts], gpus)
    where = dict(zip((part.name for part in parts), numbers, strict=True))
    for part in parts:
        if part.tied is not None:
            where[part.name] = where[part.tied]
    return tuple(f"cuda:{where[part.name]}" for part in parts)


def _within(whole: Placement, room: Mapping[str, float], gpus: int) -> Placement:
    """As many of the first blocks to disk as the devices lack room for; all of them, where even that is too few.

    The first, as a backward pass ends at the lowest layer that it is for, and need not read what is below.
    """
    blocks = [part for part in whole.parts if part.block]
    found = whole
    for count in range(len(blocks) + 1):
        gone = {part.name for part in blocks[:count]}
        kept = tuple(part for part in whole.parts if part.name not in gone)
        where = dict(zip((part.name for part in kept), _balanced(kept, whole.main, gpus), strict=True))
        found = Placement(whole.parts, tuple(where.get(part.name, DISK) for part in whole.parts), whole.main, gpus)
        if all(found.held(device) <= room.get(device, 0.0) for device in found.computing):
            break
    return found


def _mapped(
    model: nn.Module, parts: Sequence[Part], asked: Mapping[str, int | str], main: str, gpus: int
) -> tuple[str, ...]:
    """The devices of a mapping, each part by the longest name in it that is its own or that of what it is in."""
    names = {name for name, _ in model.named_modules()}
    for name in asked:
        if name not in names:
            near = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.0)
            raise UserError(f"model.device_map: the model has no module {shown(name)}; did you mean '{near[0]}'?")
        inside = next((part.name for part in parts if name != part.name and _holds(part.name, name)), None)
        if inside is not None:
            raise UserError(
                f"model.device_map: '{name}' is a piece of '{inside}', which has to lie in one place; name '{inside}'"
            )
    devices = {name: _device(name, where, main, gpus) for name, where in asked.items()}
    found: dict[str, str] = {}
    for part in parts:
        over = [name for name in devices if _holds(name, part.name)]
        if over:
            found[part.name] = devices[max(over, key=len)]
        elif not part.parameters and part.tied is None:
            found[part.name] = main  # it has tables at most, such as those of rotations
    missing = [part.name for part in parts if part.name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"model.device_map leaves out '{missing[0]}'{more}: give every module a device, or '' to all")
    for part in parts:
        if part.tied is not None and found[part.name] != found[part.tied]:
            raise UserError(
                f"model.device_map: '{part.name}' shares its weight with '{part.tied}': put both on one device"
            )
    if main != CPU and main not in found.values():
        raise UserError("model.device_map puts nothing on GPU 0, where a worker's batches are; count its GPUs from 0")
    return tuple(found[part.name] for part in parts)


def _holds(outer: str, inner: str) -> bool:
    """Whether a module is another one, or is inside it."""
    return not outer or outer == inner or inner.startswith(f"{outer}.")


def _device(name: str, where: int | str, main: str, gpus: int) -> str:
    """``cpu``, ``disk`` or ``cuda:N``."""
    text = "0" if where == "cuda" else str(where)
    if text in (CPU, DISK):
        return text
    match = _GPU.fullmatch(text)
    if match is None:
        raise UserError(
            f"model.device_map: '{name}' on {shown(where)}: a device is the number of one of the worker's GPUs "
            "(0, 1, …), cpu or disk"
        )
    number = int(match[1])
    if main == CPU:
        raise UserError(f"model.device_map puts '{name}' on GPU {number}, but model.device is cpu; use cpu or disk")
    if number >= gpus:
        have = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        raise UserError(
            f"model.device_map puts '{name}' on GPU {number}, but a worker has {have}, counted from 0; set "
            f"engine.gpus_per_worker={number + 1}, or name another device"
        )
    return f"cuda:{number}"


def _check_read(model: nn.Module, found: Placement) -> None:
    """Raises UserError where something cannot be read anew each time it runs."""
    if found.reads and has_adapter(model):
        raise UserError(
            f"model.device_map leaves '{found.reads[0].name}' outside of the devices, which does not go with "
            "model.adapter: keep the whole model on them"
        )
    for part in found.reads:
        if any(isinstance(module, SplitExperts) for module in model.get_submodule(part.name).modules()):
            raise UserError(
                f"model.device_map leaves '{part.name}' outside of the devices: its experts' weights are fused, and "
                "cannot be read anew each time they run; keep it on a device"
            )
