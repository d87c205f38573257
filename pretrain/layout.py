"""`transxssm doctor --layout`: which rank does what on which node."""

from rich.table import Table

from parallel.split import layer_chunks
from parallel.topology import AXES, Topology, topology
from pretrain.config import Config
from pretrain.console import whole_console
from untrusted.numbers import counted


def print_layout(config: Config, nodes: int, gpus_per_node: int) -> None:
    """The rank map of a job, its stages, and what each axis' groups reach over.

    Raises ConfigError where the layout does not fit the job.
    """
    world_size = nodes * gpus_per_node
    top = topology(config.parallel, config.data_parallel(world_size), gpus_per_node)
    sizes = " × ".join(f"{axis} {getattr(top, axis)}" for axis in AXES)
    console = whole_console()
    console.print(
        f"{counted(world_size, 'rank')} on {counted(nodes, 'node')}: {sizes}, tensor fastest"
    )
    console.print(_rank_map(top))
    chunks = layer_chunks(config.model, config.parallel, max(config.seq_lens))
    for stage in range(top.pipeline):
        parts = [
            f"{layers.start} to {layers.stop - 1}  "
            + "".join("A" if config.model.is_attention(layer) else "S" for layer in layers)
            for layers in chunks[stage :: top.pipeline]
        ]
        console.print(f"stage {stage}: layers {', then '.join(parts)}")
    for line in axis_lines(top):
        console.print(line)


def axis_lines(top: Topology) -> list[str]:
    """One line an axis: its groups, and how many nodes one reaches over."""
    lines = []
    for axis in AXES:
        size, reach = getattr(top, axis), top.nodes_of_a_group(axis)
        where = "within a node" if reach == 1 else f"each over up to {reach} nodes"
        line = f"{axis}: {top.world_size // size} groups of {size}"
        if size > 1:
            line += f", {where}; the first: {list_of_ranks(top.groups(axis)[0])}"
        if axis == "tensor" and reach > 1:
            line += (
                f"  WARNING: every layer waits for the network; use a parallel.tensor that divides "
                f"{top.ranks_per_node}"
            )
        lines.append(line)
    return lines


def _rank_map(top: Topology) -> Table:
    """A row a rank: t, c, d, p of rank r on node n."""
    table = Table("node", *(f"gpu {gpu}" for gpu in range(top.ranks_per_node)))
    for first in range(0, top.world_size, top.ranks_per_node):
        cells = []
        for rank in range(first, first + top.ranks_per_node):
            place = top.coordinates(rank)
            cells.append(f"{rank}: " + " ".join(f"{axis[0]}{place[axis]}" for axis in AXES))
        table.add_row(str(top.node(first)), *cells)
    return table


def list_of_ranks(group: list[int]) -> str:
    """The first ranks of a group."""
    shown = ", ".join(map(str, group[:8]))
    return f"{shown}, ..." if len(group) > 8 else shown
