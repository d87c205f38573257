"""The ledger: what counts, how many bytes, which part it belongs to, what the host reads."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from parallel.ledger import HOOKS, Ledger, Place, Tally

CPU, META = torch.device("cpu"), torch.device("meta")
FLOATS = 4  # bytes of one


def counted(call: Callable[[], object], device: torch.device = CPU) -> Tally:
    ledger = Ledger(device)
    with ledger:
        call()
    return Tally.sum(ledger.tallies.values())


def test_views_and_allocations_are_free() -> None:
    x = torch.zeros(4, 6)
    assert counted(lambda: x.view(24)[3:].unsqueeze(0).expand(5, -1).detach()) == Tally()
    assert counted(lambda: torch.empty(7).new_empty(3)) == Tally()
    assert counted(lambda: x.unsafe_split_with_sizes([1, 3])) == Tally()  # copies nothing


@pytest.mark.parametrize(
    ("call", "floats"),
    [
        (lambda x, y: x + y, 3 * 64),
        (lambda x, y: x.add_(y), 3 * 64),
        (lambda x, y: x @ y, 3 * 64),
        (lambda x, y: x.copy_(y), 2 * 64),  # what stood there is not read
        (lambda x, y: x.zero_(), 64),
        (lambda x, y: x + y[:1].expand(8, 8), 2 * 64 + 8),  # one row is read
        (lambda x, y: torch.exp(x, out=y), 2 * 64),
        (lambda x, y: torch.addmm(x, y, y, out=x), 4 * 64),  # a sum in place
        (lambda x, y: torch._foreach_mul_([x, y], 2.0), 4 * 64),
    ],
)
def test_every_tensor_moves_once(call: Callable[[Tensor, Tensor], object], floats: int) -> None:
    x, y = torch.ones(8, 8), torch.ones(8, 8)
    found = counted(lambda: call(x, y))
    assert (found.operations, found.bytes) == (1, floats * FLOATS)


def test_tables_are_read_where_they_are_looked_up_alone() -> None:
    table, at, flags = (
        torch.ones(1000, 8),
        torch.tensor([3, 5]),
        torch.zeros(1000, dtype=torch.bool),
    )
    assert counted(lambda: table[at]).bytes == 2 * 2 * 8 * FLOATS + at.nbytes
    found = counted(lambda: table.index_put_((at,), torch.tensor(1.0)))
    assert found.bytes == 2 * 8 * FLOATS + at.nbytes + FLOATS
    found = counted(lambda: table.index_put_((flags,), torch.tensor(1.0)))
    assert found.bytes == 1000 * 8 * FLOATS + flags.nbytes + FLOATS


def test_a_fused_optimizer_reads_its_gradients_and_writes_all_else() -> None:
    weight = torch.nn.Parameter(torch.zeros(100))
    adam = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.ones(100)
    adam.step()
    found = counted(adam.step)
    assert found.kind_bytes["_fused_adamw_"] == pytest.approx(7 * 100 * FLOATS, abs=2 * FLOATS)


def test_operations_belong_to_their_part_in_both_directions() -> None:
    ledger = Ledger(CPU)
    x, weight = torch.ones(3, 3, requires_grad=True), torch.ones(3, 3, requires_grad=True)
    with ledger:
        with ledger.part("first", "ssd"):
            y = x @ weight
            with ledger.part("inner"):
                y = y.sin()
            y = y * 2
        with ledger.part("second"):
            loss = y.exp().sum()
        loss.backward()
    kinds = {place: dict(tally.kinds) for place, tally in ledger.tallies.items()}
    assert kinds.pop(Place("", "other", "forward")) == {"ones_like": 1}
    assert kinds == {
        Place("ssd", "first", "forward"): {"mm": 1, "mul": 1},
        Place("ssd", "inner", "forward"): {"sin": 1},
        Place("", "second", "forward"): {"exp": 1, "sum": 1},
        Place("", "second", "backward"): {"mul": 1},
        Place("ssd", "first", "backward"): {"mul": 1, "mm": 2},
        Place("ssd", "inner", "backward"): {"cos": 1, "mul": 1},
    }


def test_what_is_recomputed_is_backward() -> None:
    ledger = Ledger(CPU)
    x = torch.ones(3, requires_grad=True)
    with ledger:
        with ledger.part("layer", "ssd"):
            inner = ledger.named(lambda t: t.sin().exp(), "inner")
            y = checkpoint(lambda t: inner(t * 2).sum(), x, use_reentrant=False)
        y.backward()
    kinds = {place: dict(tally.kinds) for place, tally in ledger.tallies.items()}
    assert kinds[Place("ssd", "inner", "forward")] == {"sin": 1, "exp": 1}
    again = kinds[Place("ssd", "inner", "backward")]
    assert (again["sin"], again["exp"], again["cos"]) == (1, 1, 1)


def test_gradients_that_accumulate_belong_to_the_hooks() -> None:
    ledger = Ledger(CPU)
    x = torch.ones(3, requires_grad=True)

    def hook(tensor: Tensor) -> None:
        assert tensor.grad is not None
        tensor.grad.neg_()

    x.register_post_accumulate_grad_hook(hook)
    for _ in range(2):
        ledger.tallies = {}
        with ledger:
            (x * 2).sum().backward()
    assert dict(ledger.tallies[Place("", HOOKS, "backward")].kinds) == {"add_": 1, "neg_": 1}


def test_reading_the_device_is_a_wait() -> None:
    x = torch.ones(3)
    found = counted(lambda: (float(x.sum()), bool((x > 0).all())))
    assert (found.waits, found.kinds["_local_scalar_dense"]) == (2, 2)


def test_what_the_host_reads_of_the_meta_device_is_answered() -> None:
    ledger = Ledger(
        META, lambda tensor, made_by: made_by == "lt" if tensor.dtype == torch.bool else 3
    )
    x = torch.ones(2, device=META)
    with ledger:
        assert float(x.sum()) == 3
        assert bool(x[0] < x[1])
        assert not bool(x.isinf().any())
        assert x.tolist() == [3, 3]
        torch.empty(2).copy_(x, non_blocking=True)
    assert Tally.sum(ledger.tallies.values()).waits == 4


def test_other_devices_do_not_count() -> None:
    assert counted(lambda: torch.ones(3) + 1, META) == Tally()
