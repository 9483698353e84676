"""What a cluster has and how fast it is: strict models of a cluster file (configs/clusters/)."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from raylux.config import Name, Real, Section
from raylux.errors import UserError, shown
from raylux.markup import parse_yaml

Positive = Annotated[Real, Field(gt=0)]
Share = Annotated[Real, Field(gt=0, le=1)]
_LIMIT = 1 << 20

# Of the devices' rates, where a worker is split over several that work at once.
SPLIT_SHARE = 0.85
# Of a device's memory: what the allocator loses, and what belongs to nobody here.
USABLE = 0.9


class Device(Section):
    """One worker's device: a GPU, or a CPU's share of cores.

    A product of matrices runs at ``rate × utilisation × small(size)``, size its smallest dimension.
    """

    kind: Name
    memory_gb: Positive = Field(description="10⁹ bytes")
    bandwidth_gb_s: Positive = Field(description="of memory, as elementwise operations reach it")
    float32_tflops: Positive
    bfloat16_tflops: Positive
    float64_tflops: Positive
    utilisation: Share = Field(1.0, description="share of these rates that large products reach; 1: they are measured")
    eigh_tflops: Positive = Field(description="eigh in float64 with vectors, as 14/3 n³ FLOPs over its time")
    small: tuple[tuple[int, Real], ...] = Field((), description="(size, share of the rate) of small products, measured")
    eigh_small: tuple[tuple[int, Real], ...] = Field((), description="(n, share of eigh's rate), measured")
    operation_us: Annotated[Real, Field(ge=0)] = Field(0.0, description="of starting one operation, however small")
    host_gb_s: Positive = Field(25.0, description="between device and host memory")
    gpu: bool = True

    @property
    def memory(self) -> float:
        """Bytes that may be used."""
        return self.memory_gb * 1e9 * USABLE

    def rate(self, precision: str, size: float = math.inf) -> float:
        """FLOP/s of a product whose smallest dimension is ``size``."""
        peak = {"float32": self.float32_tflops, "bfloat16": self.bfloat16_tflops, "float64": self.float64_tflops}
        return peak[precision] * 1e12 * self.utilisation * _share(self.small, size)

    def seconds(self, flops: float, precision: str, size: float = math.inf, touched: float = 0.0) -> float:
        """The longer of computing and of moving ``touched`` bytes through memory."""
        return max(flops / self.rate(precision, size), touched / (self.bandwidth_gb_s * 1e9))

    def starting(self, operations: float) -> float:
        """Seconds of starting operations from Python; a GPU computes meanwhile."""
        return 0.0 if self.gpu else operations * self.operation_us * 1e-6

    def eigh_seconds(self, n: int) -> float:
        """Of one symmetric n × n eigendecomposition with vectors in float64."""
        return eigh_flops(n) / (self.eigh_tflops * 1e12 * _share(self.eigh_small, n))


class Cluster(Section):
    """Devices in nodes; what is not said of the price is not reckoned."""

    devices: int = Field(ge=1, le=1_000_000)
    per_node: int = Field(8, ge=1, le=1024)
    devices_per_worker: int = Field(1, ge=1, le=1024, description="a model over several devices")
    turns: bool = Field(
        False, description="the devices of a worker work one after the other, as the engine's do; otherwise at once"
    )
    device: Device
    host_memory_gb: Positive = Field(description="of a node; factor shards live there")
    network_gb_s: Positive = Field(description="of a node, in one direction")
    disk_gb_s: Positive = Field(description="of a node to where the run folder is")
    disk_tb: Positive = Field(description="room for the run folder, 10¹² bytes")
    price_per_device_hour: Annotated[Real, Field(ge=0)] | None = None

    @property
    def nodes(self) -> int:
        return math.ceil(self.devices / self.per_node)

    @property
    def workers(self) -> int:
        return max(1, self.devices // self.devices_per_worker)

    def of_workers(self, devices: int) -> Cluster:
        """The same machines where a worker has so many devices, of which one runs its blocks while the others wait."""
        return self.model_copy(update={"devices_per_worker": devices, "turns": True})

    @property
    def worker(self) -> Device:
        """A worker's devices taken together."""
        count = self.devices_per_worker
        if count == 1:
            return self.device
        if self.turns:
            return self.device.model_copy(update={"memory_gb": self.device.memory_gb * count})
        rates = ("float32_tflops", "bfloat16_tflops", "float64_tflops")
        more = {name: getattr(self.device, name) * count * SPLIT_SHARE for name in rates}
        more |= {name: getattr(self.device, name) * count for name in ("memory_gb", "bandwidth_gb_s", "host_gb_s")}
        return self.device.model_copy(update=more)

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """Read a cluster file. Raises UserError: not there, no YAML, a key is unknown or does not fit."""
        try:
            with Path(path).open("rb") as file:
                text = file.read(_LIMIT).decode("utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
        return cls.parse(parse_yaml(text, str(path)), str(path))

    @classmethod
    def parse(cls, data: Any, where: str = "cluster") -> Cluster:
        """As ``load``, from a mapping."""
        if not isinstance(data, dict):
            raise UserError(f"{where}: a cluster is a mapping (devices, device, host_memory_gb, …)")
        lists = {"small", "eigh_small"}
        device = data.get("device")
        if isinstance(device, dict):
            device = {k: tuple(map(tuple, v)) if k in lists and isinstance(v, list) else v for k, v in device.items()}
        try:
            return cls.model_validate({**data, "device": device})
        except (ValidationError, TypeError) as error:
            raise UserError(f"{where}: {_problem(error)}") from None


def _problem(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    errors = error.errors(include_url=False)
    # A misspelt key is also a missing one: the name that stands in the file is the one to show.
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    name = ".".join(str(part) for part in first["loc"])
    return f"'{name}' = {shown(first.get('input'))}: {first['msg']}"


def eigh_flops(n: int) -> float:
    """Nominal count: 4/3 n³ to tridiagonal form, 4/3 n³ in it, 2 n³ back (LAPACK's syevd with deflation)."""
    return 14.0 / 3.0 * float(n) ** 3


def _share(points: tuple[tuple[int, float], ...], size: float) -> float:
    """Measured shares, straight lines between them over log(size), constant beyond."""
    if not points:
        return 1.0
    if size <= points[0][0]:
        return points[0][1]
    for (low, first), (high, second) in itertools.pairwise(points):
        if size <= high:
            return first + (second - first) * math.log(size / low) / math.log(high / low)
    return points[-1][1]
