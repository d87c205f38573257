"""What a job's share of the GPUs' peak is a share of."""

from typing import Any

import pytest
import torch

from benchmarks.ranks import run_ranks
from parallel import peaks as peaks_module
from parallel.peaks import best_seconds, gpu_peak, job_peaks, product_peak

CPU = torch.device("cpu")


def test_a_product_has_the_rate_of_its_best_try(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 9.0, 10.0, 12.0, 20.0, 20.5, 30.0, 33.0, *[40.0, 44.0] * 4])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    assert product_peak(CPU) == 2 * 512**3 / 0.5


def test_the_first_try_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.001, *[1.0, 3.0] * 7])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    assert best_seconds(lambda: None, CPU) == 2.0


def peaks(gpus: list[str]) -> Any:
    """Of ranks whose GPUs have these names, and a product of 6e14 FLOP/s on the first."""
    import torch.distributed as dist

    from parallel.compat import prepare_host
    from parallel.groups import init_distributed
    from parallel.launch import launch_from_environment

    init_distributed(launch_from_environment(), prepare_host())
    rank = dist.get_rank()
    torch.cuda.get_device_name = lambda device: gpus[rank]
    module: Any = peaks_module
    module.product_peak = lambda device: 6e14 - rank * 1e14
    return job_peaks(torch.device("cuda")), job_peaks(CPU)


def test_all_ranks_add_up_their_gpus() -> None:
    for found, on_cpu in run_ranks(2, peaks, ["NVIDIA H200", "NVIDIA A100-SXM4-80GB"]):
        assert found == {
            "model_flop_utilisation": 989e12 + 312e12,
            "measured_flop_utilisation": 11e14,
        }
        assert on_cpu == {}


def test_a_gpu_without_a_data_sheet_leaves_the_measured_share() -> None:
    for found, _ in run_ranks(2, peaks, ["NVIDIA H200", "NVIDIA RTX 6000"]):
        assert found == {"measured_flop_utilisation": 11e14}


def test_a_cpu_has_no_data_sheet() -> None:
    assert gpu_peak(CPU) is None
