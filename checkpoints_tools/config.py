"""Checkpoint configuration. Imports neither torch nor DeepSpeed."""

from pydantic import Field

from parallel import bounds
from parallel.config import Section
from untrusted.paths import ConfiguredPath


class CheckpointConfig(Section):
    """When training state is saved, how much of it is kept, and what a run starts from."""

    dir: ConfiguredPath = ""
    """Folder of the step-* folders; empty: checkpoints/ in the run directory."""
    every: int = Field(100, ge=0, le=bounds.STEPS)
    """Steps between checkpoints, besides the one at the end; 0 saves only that one."""
    async_save: bool = True
    """Train on while a checkpoint is written. Either way it is written from a copy in host memory:
    twelve bytes for every parameter whose optimizer state a rank owns."""
    keep_last: int = Field(3, ge=1, le=bounds.COUNT)
    """Newest checkpoints kept; older ones go once a newer one is committed."""
    keep_every: int = Field(0, ge=0, le=bounds.STEPS)
    """Steps whose multiples are never removed; 0 has no such milestones."""
    resume: ConfiguredPath = "auto"
    """auto: the newest checkpoint if there is one; none: start anew; or a folder
    of another run, to start from its state."""
    load_weights_only: ConfiguredPath = ""
    """Begin a new run with these weights: of a checkpoint, or of an exported model's folder."""
    allow_data_change: bool = False
    """Go on from a checkpoint over other data, or in another order, than it was trained on."""
    allow_tokenizer_change: bool = False
    """Go on from a checkpoint with another tokenizer: token ids will mean other text."""
    allow_model_change: bool = False
    """Go on from a checkpoint with other [model] fields, where its tensors still fit."""
    begin_again: bool = False
    """Where the run's record says that steps were made, and their checkpoints are gone: set the
    record aside, in old-record-N, and begin again; or, where older checkpoints are left, set a copy
    aside and go on from them."""
