"""`transxssm kernels launches`: the counts of one step, or of one layer, in tables."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from parallel.ledger import Direction, Tally
from pretrain import launches_golden
from pretrain.config import Config, ConfigError
from pretrain.console import print_json, whole_console
from pretrain.host_cost import HostCost, host_cost
from pretrain.launches import DOCUMENTS, ONCE, Counts, count

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


def run(
    config: Config, name: str, layer: str | None, *, as_json: bool, update: bool, graphs: bool
) -> None:
    """Count a step of `config` and print it, or its layers of one kind and what the host does for
    such a layer. name: of the golden counts to compare with, if there are any; update: accept these
    as the golden ones; graphs: count what the host launches with micro-batches as graphs, which has
    no golden counts.

    Raises ConfigError for what cannot be counted.
    """
    if graphs and (update or layer is not None):
        raise ConfigError("--graphs counts whole micro-batches; leave --update and --layer out")
    counts = count(config, graphs=graphs)
    if layer is not None and not counts.layers[layer]:
        raise ConfigError(f"--layer {layer}: this rank has no such layer")
    if update:
        launches_golden.write(name, counts, launches_golden.PATH)
        launches_golden.write_page(launches_golden.PATH, launches_golden.PAGE)
    cost = None if layer is None else host_cost(config, layer)
    if as_json:
        print_json(_plain(config, counts, layer, cost))
        return
    console = whole_console()
    console.print(_heading(config, counts))
    if graphs:
        console.print(_graph_sentence(counts))
        return
    if layer is not None:
        console.print(_layer_table(counts, layer))
        console.print(_host_sentence(layer, cost))
        return
    console.print(_micro_batch_table(counts))
    console.print(_once_table(counts))
    _print_summary(console, counts)
    if name in launches_golden.recorded(launches_golden.PATH) and not update:
        for change in launches_golden.changes(name, counts, launches_golden.PATH):
            console.print(f"changed: {change}")


def _graph_sentence(counts: Counts) -> str:
    whole = counts.of()
    kinds = ", ".join(f"{times} × {kind}" for kind, times in whole.kinds.most_common())
    return (
        f"the host launches {whole.operations} operations a micro-batch ({kinds}), and "
        f"{counts.step.operations - whole.operations * counts.micro_batches} more a step of "
        f"{counts.micro_batches}"
    )


def _heading(config: Config, counts: Counts) -> str:
    parallel = config.parallel
    return (
        f"rank 0 of {counts.ranks} (tensor {parallel.tensor}, context {parallel.context}, "
        f"pipeline {parallel.pipeline}, data 1), ZeRO {parallel.zero_stage}, "
        f"{config.training.dtype}; micro-batches of {counts.tokens:,} tokens here, rows of "
        f"{DOCUMENTS} documents"
    )


def _micro_batch_table(counts: Counts) -> Table:
    table = Table(
        "one micro-batch", "each of", "forward", "backward", "operations", "MB", "waits",
        title="device operations",
    )  # fmt: skip
    for layer, number in counts.layers.items():
        for part in _parts(counts, layer):
            _add_row(table, counts, layer, part, number)
        if number:
            _add_row(table, counts, layer, None, number)
    for part in _parts(counts, ""):
        _add_row(table, counts, "", part, 1)
    whole = counts.of()
    directions = [f"{counts.of(direction=d).operations:,}" for d in DIRECTIONS]
    table.add_section()
    table.add_row("all", "", *directions, *_cells(whole, 1))
    return table


def _parts(counts: Counts, layer: str) -> list[str]:
    return list(dict.fromkeys(p.part for p in counts.micro_batch if p.layer == layer))


def _add_row(table: Table, counts: Counts, layer: str, part: str | None, number: int) -> None:
    name = f"{_name(layer)} layer" if part is None else part
    name = f"  {name}" if layer and part is not None else name
    directions = [_number(counts.of(layer, part, d).operations / number) for d in DIRECTIONS]
    table.add_row(
        name, str(number), *directions, *_cells(counts.of(layer, part), number),
        end_section=bool(layer) and part is None,
    )  # fmt: skip


def _cells(tally: Tally, number: int) -> list[str]:
    """Operations, megabytes and waits of each of so many."""
    megabytes = tally.bytes / number / 1e6
    return [_number(tally.operations / number), f"{megabytes:,.1f}", _number(tally.waits / number)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def _name(layer: str) -> str:
    return "SSD" if layer == "ssd" else layer


def _once_table(counts: Counts) -> Table:
    table = Table("once a step", "operations", "MB", "waits")
    for part in ONCE:
        table.add_row(part, *_cells(counts.once[part], 1))
    table.add_section()
    table.add_row(f"step of {counts.micro_batches} micro-batches", *_cells(counts.step, 1))
    return table


def _print_summary(console: Console, counts: Counts) -> None:
    found = counts.summary()
    for layer, number in counts.layers.items():
        if number:
            operations = _number(counts.a_layer(layer))
            console.print(f"{_name(layer)} layer, forward and backward: {operations} operations")
    if counts.head_blocks:
        tokens = -(-counts.tokens // counts.head_blocks)
        console.print(
            f"head: {_number(found['head_operations_a_block'])} operations a block of {tokens:,} "
            f"tokens, {found['head_bytes_a_logit_beside_products']:.1f} bytes a logit beside the "
            "products"
        )
    hooks, whole = found["gradient_hooks_operations"], found["micro_batch_operations"]
    console.print(f"gradient hooks: {hooks:,} operations a micro-batch")
    update = counts.once["update"]
    console.print(f"update: {update.operations:,} operations, waits for the device: {update.waits}")
    console.print(f"micro-batch of {counts.tokens:,} tokens: {whole:,} operations")


def _layer_table(counts: Counts, layer: str) -> Table:
    """Operations of one layer by their names."""
    number = counts.layers[layer]
    table = Table(f"{_name(layer)} layer", "pass", "operation", "times", "MB")
    for part in _parts(counts, layer):
        for direction in DIRECTIONS:
            tally = counts.of(layer, part, direction)
            for kind, times in tally.kinds.most_common():
                moved = tally.kind_bytes[kind] / number / 1e6
                table.add_row(part, direction, kind, _number(times / number), f"{moved:,.1f}")
    table.add_section()
    table.add_row("all", "", "", *_cells(counts.of(layer), number)[:2])
    return table


def _host_sentence(layer: str, cost: HostCost | str | None) -> str:
    if not isinstance(cost, HostCost):
        return f"the host's time is left out: {cost}"
    return (
        f"the host, forward and backward of an {_name(layer)} layer: {cost.python_calls:,} Python "
        f"calls, {cost.microseconds:,.0f} µs (forward {cost.forward_microseconds:,.0f} µs) on this "
        "host's CPU"
    )


def _plain(
    config: Config, counts: Counts, layer: str | None, cost: HostCost | str | None
) -> dict[str, Any]:
    places = [
        asdict(place) | _plain_tally(tally)
        for place, tally in counts.micro_batch.items()
        if layer is None or place.layer == layer
    ]
    found: dict[str, Any] = {
        "parallel": config.parallel.model_dump(),
        "ranks": counts.ranks,
        "tokens": counts.tokens,
        "micro_batches": counts.micro_batches,
        "layers": counts.layers,
        "micro_batch": places,
        "summary": counts.summary(),
    }
    if layer is None:
        once = [{"part": part} | _plain_tally(tally) for part, tally in counts.once.items()]
        return found | {"once": once}
    return found | {"host": asdict(cost) if isinstance(cost, HostCost) else {"left_out": cost}}


def _plain_tally(tally: Tally) -> dict[str, Any]:
    return {
        "operations": tally.operations,
        "bytes": tally.bytes,
        "waits": tally.waits,
        "kinds": dict(tally.kinds),
    }
