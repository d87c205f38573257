"""Which packed attention runs: the newest that is installed, right, and the same on all ranks."""

import logging
from typing import Any

import pytest
import torch

from benchmarks.ranks import run_ranks
from parallel import attention_choice
from parallel.attention_choice import _is_installed, difference
from parallel.config import ModelConfig

MODEL = ModelConfig(
    hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=16, state_dim=16, ssd_groups=2,
    num_layers=2, intermediate_size=64,
)  # fmt: skip


def chosen(
    installed: list[set[str]], capability: tuple[int, int], wrong: set[str]
) -> tuple[str, list[str], list[str]]:
    """On each rank: what was chosen, what was activated and restored, and what was warned of."""
    import torch.distributed as dist

    from parallel.compat import prepare_host
    from parallel.groups import init_distributed
    from parallel.launch import launch_from_environment

    init_distributed(launch_from_environment(), prepare_host())
    packages = {attention_choice.PACKAGES[name] for name in installed[dist.get_rank()]}
    calls: list[str] = []
    messages: list[str] = []

    def is_right(*given: Any) -> str | None:
        return "its dq differs" if calls[-1] in wrong else None

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logging.getLogger("transxssm").addHandler(Kept(logging.WARNING))
    torch.cuda.get_device_capability = lambda device: capability
    module: Any = attention_choice
    module.activate_flash_attention_impl = calls.append
    module.restore_flash_attention_impl = lambda: calls.append("restored")
    module._is_installed = lambda name: name in packages
    module.difference = is_right
    name = module.choose_attention(MODEL, torch.device("cuda"), torch.bfloat16)
    return name, calls, messages


BOTH = {"FA3", "FA4"}


@pytest.mark.parametrize(
    ("installed", "capability", "wrong", "name", "calls"),
    [
        (BOTH, (9, 0), set(), "FA3", ["FA3"]),
        (BOTH, (10, 0), set(), "FA4", ["FA4"]),
        ({"FA4"}, (9, 0), set(), "FA4", ["FA4"]),
        (BOTH, (9, 0), {"FA3"}, "FA4", ["FA3", "restored", "FA4"]),
        (BOTH, (9, 0), BOTH, "", ["FA3", "restored", "FA4", "restored"]),
        (BOTH, (8, 0), set(), "", []),
        (set(), (9, 0), set(), "", []),
    ],
)
def test_the_newest_that_is_right_is_chosen(
    installed: set[str], capability: tuple[int, int], wrong: set[str], name: str, calls: list[str]
) -> None:
    ((found, made, messages),) = run_ranks(1, chosen, [installed], capability, wrong)
    assert (found, made) == (name, calls)
    refused = calls.count("restored")
    assert len(messages) == refused
    assert all("is not used: its dq differs" in message for message in messages)


def test_ranks_with_other_packages_use_pytorchs_own() -> None:
    first, second = run_ranks(2, chosen, [{"FA3"}, set()], (9, 0), set())
    assert first[:2] == ("", ["FA3", "restored"])
    assert second == ("", [], [])
    assert "on different ranks" in first[2][0]


def test_a_cpu_chooses_nothing() -> None:
    assert attention_choice._activated(MODEL, torch.device("cpu"), torch.bfloat16) == ""


def test_wrong_results_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert difference(MODEL, cpu, torch.bfloat16) is None
    right = attention_choice.attention

    def across_documents(q: Any, k: Any, v: Any, cu_seqlens: Any) -> Any:
        if q.dtype == torch.bfloat16:
            cu_seqlens = torch.tensor([0, 140, 280], dtype=torch.int32)
        return right(q, k, v, cu_seqlens)

    monkeypatch.setattr(attention_choice, "attention", across_documents)
    found = difference(MODEL, cpu, torch.bfloat16)
    assert found is not None
    assert found.startswith("its output differs")


def test_modules_of_missing_packages_are_not_installed() -> None:
    assert not _is_installed("no_such_package.cute")
    assert not _is_installed("torch.no_such_module")
    assert _is_installed("torch.nn")
