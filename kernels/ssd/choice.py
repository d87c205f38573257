"""Which shape a scan takes (`kernels.ssd.shapes`)."""

from collections.abc import Iterator
from functools import lru_cache

from kernels.ssd import traffic
from kernels.ssd.shapes import Problem, Shape, segmented
from kernels.ssd.tiles import Tile, products_read_shared
from kernels.target import Target

HELD = 128  # rows of states, of all heads of a program, that registers hold
BUSY = 5 / 6  # share of the processors; below it, cutting rows costs less than idle processors
WAVES = 2  # of programs on all processors, at least, where rows are cut


@lru_cache(maxsize=256)
def choose_shape(
    problem: Problem, tile: Tile, target: Target, backward: bool, may_segment: bool = True
) -> Shape:
    """The shape of a pass, from the number of its programs and the bytes that it moves.

    may_segment: whether the segmented shape is among the choices (`kernels.paths`).

    - Rows are not cut where their programs keep 5/6 of the processors busy: that moves the fewest
      bytes, in one launch.
    - Else the segmented or the split shape, whichever moves fewer bytes, with two waves of programs
      in every launch of the segmented one.
    - Two heads of a group share a program of the forward where registers hold both states.
    - The backward holds states in registers only where operands of products leave them free, and
      only if every head has B and C of its own. Heads that share them are walked by one program,
      chunk by chunk: dB and dC, which are as large as a state, are in registers instead.
    """
    choices = list(_fused(problem, tile, target, backward))
    busy = [Shape("fused", heads) for heads, n in choices if _busy(n, target) >= BUSY]
    count = traffic.backward if backward else traffic.forward
    if not busy:
        chunks = -(-problem.length // tile.chunk)
        busy = [_split(problem, tile, target, backward)]
        for heads, programs in choices if may_segment else ():
            segments = max(3, -(-WAVES * target.num_sms // programs) + 1)
            if segments <= chunks:
                busy.append(segmented(chunks, segments, heads))
    return min(busy, key=lambda shape: count(problem, tile, shape).total)


def _fused(
    problem: Problem, tile: Tile, target: Target, backward: bool
) -> Iterator[tuple[int, int]]:
    """Heads of a program that walks rows or segments, and how many programs that makes a row's
    worth of all heads."""
    from_shared = products_read_shared(target, problem.dtype)
    if backward:
        if from_shared and problem.per_group == 1:
            yield 1, problem.batch * problem.heads
        return
    blocks = problem.head_dim // tile.p_block
    yield 1, problem.batch * problem.heads * blocks
    if from_shared and problem.per_group > 1 and blocks == 1 and 2 * problem.head_dim <= HELD:
        yield 2, problem.batch * problem.groups * -(-problem.per_group // 2)


def _split(problem: Problem, tile: Tile, target: Target, backward: bool) -> Shape:
    if backward:
        pairs = (
            problem.per_group > 1
            and tile.p_block == problem.head_dim
            and products_read_shared(target, problem.dtype)
        )
        return Shape("split", problem.per_group, span=2 if pairs else 1)
    chunks = -(-problem.length // tile.chunk)
    enough = WAVES * target.num_sms
    heads = problem.per_group
    while heads > 1 and (
        problem.per_group % heads or chunks * problem.batch * problem.heads // heads < enough
    ):
        heads -= 1
    return Shape("split", heads)


def _busy(programs: int, target: Target) -> float:
    waves = -(-programs // target.num_sms)
    return programs / (waves * target.num_sms)
