"""What each parameter of a stage is globally: the one description that initialisation, checkpoints,
weight decay and gradient comparison share.

Global names and shapes are those of the single-GPU model (the vocabulary without its padding), so
they do not depend on the layout.
"""

from dataclasses import dataclass

from torch import nn

from parallel.config import ModelConfig

EMBEDDING = "model.word_embed.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class RowRange:
    """`length` indices along the split dimension: local ones from `local`, global from `start`."""

    local: int
    start: int
    length: int


@dataclass(frozen=True)
class ParamInfo:
    """Where the local tensor of a parameter lies in the global one.

    dim: the split dimension (0 for replicated parameters, with one range over everything).
    tensor_parallel: whether ranks of the tensor-parallel group hold different parts.
    duplicate: another pipeline stage owns this parameter (tied embedding on the last stage).
    """

    name: str
    global_shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    dim: int
    ranges: tuple[RowRange, ...]
    tensor_parallel: bool
    duplicate: bool

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: projection matrices only (DESIGN: no norms, A_log, ...)."""
        return self.name.endswith("_proj.weight") or self.name == HEAD


def describe_parameters(
    stage: nn.Module, model: ModelConfig, tensor_rank: int, tensor_size: int
) -> dict[str, ParamInfo]:
    """ParamInfo of every parameter of a stage (or of several model chunks), by global name.

    Call before ZeRO-3 replaces the parameters' shapes.
    """
    duplicates: frozenset[str] = getattr(stage, "duplicate_parameters", frozenset())
    infos = {}
    for name, parameter in stage.named_parameters():
        local = tuple(parameter.shape)
        split = bool(getattr(parameter, "tensor_model_parallel", False))
        dim = int(getattr(parameter, "partition_dim", 0)) if split else 0
        size = local[dim]
        start, total = (tensor_rank * size, tensor_size * size) if split else (0, size)
        ranges: tuple[RowRange, ...] = (RowRange(0, start, size),)
        if name in (EMBEDDING, HEAD):  # padding rows are nobody's
            total = model.vocab_size
            valid = max(0, min(size, total - start))
            ranges = (RowRange(0, start, valid),) if valid else ()
        elif name.endswith("ssd.conv.weight"):
            split = tensor_size > 1
            total = size * tensor_size
            ranges = _conv_ranges(model, tensor_rank, tensor_size)
        shape = (*local[:dim], total, *local[dim + 1 :])
        infos[name] = ParamInfo(name, shape, local, dim, ranges, split, name in duplicates)
    return infos


def _conv_ranges(model: ModelConfig, rank: int, size: int) -> tuple[RowRange, ...]:
    """The x, b and c channels of a rank: three ranges of the convolution's channels."""
    kinds = [model.num_heads * model.head_dim] + 2 * [model.ssd_groups * model.state_dim]
    ranges, local, start = [], 0, 0
    for channels in kinds:
        part = channels // size
        ranges.append(RowRange(local, start + rank * part, part))
        local, start = local + part, start + channels
    return tuple(ranges)
