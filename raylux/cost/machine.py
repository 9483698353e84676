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

    A product of matrices runs at ``rate × utilisation × small(size)``, size its smallest dimension. What is not said of
    attention, symmetric updates, activations and float32 eigendecompositions is reckoned as products, as full products,
    as memory alone and as float64.
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
    bfloat16_small: tuple[tuple[int, Real], ...] = Field(
        (), description="(width, share) of products with square matrices in bfloat16; none: as small"
    )
    bfloat16_odd: tuple[tuple[int, Real], ...] = Field(
        (), description="the same of widths that are odd, as with a bias beside the inputs; none: as bfloat16_small"
    )
    forming_tflops: Positive | None = Field(None, description="of gradients formed of their tokens in bfloat16")
    attention_tflops: Positive | None = Field(None, description="of attention, forward and backward, 12·T²·d FLOPs")
    symmetric_tflops: Positive | None = Field(None, description="of symmetric rank-k updates, 2·n² FLOPs per row")
    gelu_ns: Annotated[Real, Field(ge=0)] = Field(0.0, description="of one number through GELU, forward and backward")
    silu_ns: Annotated[Real, Field(ge=0)] = Field(0.0, description="of one number through SiLU, forward and backward")
    eigh_float32_tflops: Positive | None = Field(None, description="as eigh_tflops, in float32")
    eigh_small: tuple[tuple[int, Real], ...] = Field((), description="(n, share of eigh's rate), measured")
    operation_us: Annotated[Real, Field(ge=0)] = Field(0.0, description="of starting one operation, however small")
    host_gb_s: Positive = Field(
        25.0, description="between device and host memory; on a CPU into memory that was not in use before"
    )
    gpu: bool = True

    @property
    def memory(self) -> float:
        """Bytes that may be used."""
        return self.memory_gb * 1e9 * USABLE

    def rate(self, precision: str, size: float = math.inf, odd: bool = False) -> float:
        """FLOP/s of a product whose smallest dimension is ``size``; ``odd``: some width of it is an odd number."""
        peak = {"float32": self.float32_tflops, "bfloat16": self.bfloat16_tflops, "float64": self.float64_tflops}
        small = self.small
        if precision == "bfloat16":
            small = (odd and self.bfloat16_odd) or self.bfloat16_small or self.small
        return peak[precision] * 1e12 * self.utilisation * _share(small, size)

    def seconds(
        self, flops: float, precision: str, size: float = math.inf, touched: float = 0.0, odd: bool = False
    ) -> float:
        """The longer of computing and of moving ``touched`` bytes through memory; a CPU's core does not do both."""
        computing, moving = flops / self.rate(precision, size, odd), self.touching(touched)
        return max(computing, moving) if self.gpu else computing + moving

    def touching(self, size: float) -> float:
        """Seconds of moving so many bytes through memory."""
        return size / (self.bandwidth_gb_s * 1e9)

    def renewing(self, size: float) -> float:
        """Seconds of putting so many bytes where a CPU's memory was not in use; a GPU keeps its own."""
        return 0.0 if self.gpu else size / (self.host_gb_s * 1e9)

    def forming_seconds(self, flops: float, precision: str, size: float, touched: float = 0.0) -> float:
        """Of gradients formed of tokens; ``size``: the smallest dimension of the product."""
        if self.forming_tflops is None or precision != "bfloat16":
            return self.seconds(flops, precision, size, touched)
        return flops / (self.forming_tflops * 1e12) + self.touching(touched)

    def attention_seconds(self, flops: float, precision: str, size: float) -> float:
        """Of attention, whose products run in a kernel of their own."""
        own = self.attention_tflops
        return self.seconds(flops, precision, size) if own is None else flops / (own * 1e12)

    def symmetric_seconds(self, flops: float, precision: str, size: float, touched: float) -> float:
        """Of symmetric updates in float32 or better; ``flops`` counts a triangle alone where only that is computed."""
        if self.symmetric_tflops is None or precision != "float32":
            return self.seconds(flops, precision, size, touched)
        return flops / (self.symmetric_tflops * 1e12) + self.touching(touched)

    def activation_seconds(self, activation: str, numbers: float) -> float:
        """What an MLP's activation takes, forward and backward, beside moving its numbers through memory."""
        return numbers * 1e-9 * {"gelu": self.gelu_ns, "silu": self.silu_ns}.get(activation, 0.0)

    def starting(self, operations: float) -> float:
        """Seconds of starting operations from Python; a GPU computes meanwhile."""
        return 0.0 if self.gpu else operations * self.operation_us * 1e-6

    def eigh_seconds(self, n: int, precision: str = "float64") -> float:
        """Of one symmetric n × n eigendecomposition with vectors."""
        rate = (self.eigh_float32_tflops if precision == "float32" else None) or self.eigh_tflops
        return eigh_flops(n) / (rate * 1e12 * _share(self.eigh_small, n))


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
        rates = ("float32_tflops", "bfloat16_tflops", "float64_tflops", "attention_tflops", "symmetric_tflops")
        there = {name: getattr(self.device, name) for name in rates}
        more = {name: rate * count * SPLIT_SHARE for name, rate in there.items() if rate is not None}
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
        lists = {"small", "bfloat16_small", "bfloat16_odd", "eigh_small"}
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
