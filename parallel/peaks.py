"""Peak rate of matrix products on a device: by its data sheet, and as measured here."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from parallel.groups import host_group
from parallel.roofline import GPUS

TRIES = 8  # of which the first warms up


def gpu_peak(device: torch.device) -> float | None:
    """Return the data sheet's dense bf16 FLOP/s, or None for a device that is not one of GPUS."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((gpu.flops for key, gpu in GPUS.items() if key in name), None)


def product_peak(device: torch.device) -> float:
    """Measure the FLOP/s of a large bf16 matrix product, or of a smaller float32 one on a CPU.

    Return the best of some tries. Waits for the device.
    """
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    # random numbers: equal ones take less power, so that a GPU's clock stays higher
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / best_seconds(lambda: a @ a, device)


def best_seconds(action: Callable[[], Any], device: torch.device) -> float:
    """Return the shortest time that an action takes on the device."""
    found = []
    for _ in range(TRIES):
        begin = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begin)
    return min(found[1:])


def job_peaks(device: torch.device) -> dict[str, float]:
    """Sum the peak FLOP/s of all ranks' GPUs, by the metric that is a share of it. Collective.

    Return nothing on CPUs. Leave out the data sheet's peak if a rank's GPU is not one of GPUS.
    """
    if device.type != "cuda":
        return {}
    sheet = gpu_peak(device)
    mine = torch.tensor([product_peak(device), sheet or 0.0, sheet is None], dtype=torch.float64)
    dist.all_reduce(mine, group=host_group())
    by_measurement, by_sheet, unknown = mine.tolist()
    peaks = {"measured_flop_utilisation": by_measurement}
    return peaks if unknown else {"model_flop_utilisation": by_sheet} | peaks
