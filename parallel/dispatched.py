"""Operations as modes of `torch.utils._python_dispatch` see them, below autograd."""

from functools import cache
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

# Beside views they give memory or a name to it, and compute nothing.
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view",
        "unsafe_split_with_sizes", "_reshape_alias", "lift_fresh", "set_"}  # fmt: skip
# The host reads a value of a tensor, or a size that depends on values.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"}


@cache
def is_free(func: Any) -> bool:
    """Return whether an operation is a view, an allocation or a question."""
    return func.is_view or func.overloadpacket.__name__ in FREE


def named_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the given arguments by their names in the operation's schema."""
    return dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs


def written_names(func: Any) -> set[str]:
    """Return the names of the arguments that an operation says it writes."""
    return {a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write}


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors of nested arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
