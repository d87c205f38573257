"""Which rank does what: the order of Megatron-core's groups over nodes. Imports no torch.

Tensor varies fastest, then context, data and pipeline (Megatron's order "tp-cp-ep-dp-pp"):

    rank = tensor + T · (context + C · (data + D · pipeline))

The axes that talk most have the nearest peers: tensor several times a layer, context once or twice
a layer, data once a step; stages pass on hidden states alone.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from parallel.config import ParallelConfig

Axis = Literal["tensor", "context", "data", "pipeline"]
AXES: tuple[Axis, ...] = get_args(Axis)  # fastest first


@dataclass(frozen=True)
class Topology:
    """Sizes of the axes, and how many consecutive ranks a node holds."""

    tensor: int
    context: int
    data: int
    pipeline: int
    ranks_per_node: int

    @property
    def world_size(self) -> int:
        return self.tensor * self.context * self.data * self.pipeline

    def coordinates(self, rank: int) -> dict[Axis, int]:
        """A rank's place on every axis."""
        found: dict[Axis, int] = {}
        for axis in AXES:
            rank, found[axis] = divmod(rank, getattr(self, axis))
        return found

    def groups(self, axis: Axis) -> list[list[int]]:
        """Ranks that communicate along an axis: those that differ on it alone, in its order."""
        together: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            place = self.coordinates(rank)
            others = tuple(place[other] for other in AXES if other != axis)
            together.setdefault(others, []).append(rank)
        return list(together.values())

    def node(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def nodes_of_a_group(self, axis: Axis) -> int:
        """The most nodes that one group of an axis reaches over."""
        size, stride, node = getattr(self, axis), 1, self.ranks_per_node
        for faster in AXES[: AXES.index(axis)]:
            stride *= getattr(self, faster)
        apart = range(0, self.world_size, stride * size)
        # a group's reach depends on where in a node its first rank is
        firsts = {(low + high) % node for low in range(min(stride, node)) for high in apart[:node]}
        return max(
            len({(first + stride * member) // node for member in range(size)}) for first in firsts
        )


def topology(parallel: ParallelConfig, data: int, ranks_per_node: int) -> Topology:
    """Of a layout whose data-parallel size is `data`."""
    return Topology(parallel.tensor, parallel.context, data, parallel.pipeline, ranks_per_node)
