"""Lower bounds on a kernel's time from its traffic and its products; nothing here is measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes that all programs of one or more launches read and write in device memory.

    Every program's accesses count, also where another has loaded the same bytes into a cache.
    """

    loaded: int
    stored: int

    @property
    def total(self) -> int:
        return self.loaded + self.stored

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.loaded + other.loaded, self.stored + other.stored)


@dataclass(frozen=True)
class Work:
    """What one pass (forward or backward) of an operation has to do."""

    traffic: Traffic  # of our kernels, by formula
    minimum: int  # bytes: inputs and outputs once
    flops: int  # of matrix products, those of masked-out parts of tiles included
    allowed: float = float("inf")  # traffic over minimum


@dataclass(frozen=True)
class Peak:
    """What the vendor states for one GPU."""

    name: str
    bytes_per_second: float
    half_flops_per_second: float  # bfloat16 or float16 on tensor cores, dense


# NVIDIA's A100 80GB SXM, H100 SXM and HGX B200 data sheets (dense: half the sparse figure there),
# AMD's Instinct MI300X data sheet.
PEAKS = {
    "sm_80": Peak("A100 SXM 80 GB", 2.04e12, 312e12),
    "sm_90": Peak("H100 SXM", 3.35e12, 989e12),
    "sm_100": Peak("B200", 8.0e12, 2250e12),
    "gfx942": Peak("MI300X", 5.3e12, 1307e12),
}


def bound_seconds(total_bytes: int, flops: int, peak: Peak) -> float:
    """No run can be faster: all bytes at full bandwidth, all products at full rate, overlapped."""
    return max(total_bytes / peak.bytes_per_second, flops / peak.half_flops_per_second)
