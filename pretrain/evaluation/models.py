"""Models that are evaluated: sharded over this job's ranks, or exported, in one process."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer  # type: ignore[import-untyped]
from torch import Tensor

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.manifest import damaged_files, listed
from checkpoints_tools.model_folder import load_model
from checkpoints_tools.single_gpu import ModelError
from checkpoints_tools.tokenizer_file import TOKENIZER, read_tokenizer
from data_pipeline.batch import Batch
from parallel.config import ModelConfig, ParallelConfig
from parallel.launch import Launch
from parallel.sums import Key, sums_by
from pretrain.config import ConfigError, check_layout
from pretrain.evaluation.scores import token_bytes
from pretrain.generate import END_OF_TEXT, load_tokenizer
from untrusted.numbers import counted

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS_AT_ONCE = 1 << 13  # of one rank; a longer row comes alone
HEAD_TOKENS = 1 << 10  # whose logits live at a time


class Model(Protocol):
    """What evaluation asks of a model."""

    name: str
    tokenizer: Tokenizer
    tokenizer_json: bytes
    """Content of its file."""
    vocab_size: int
    end_of_text: int
    max_length: int
    """Tokens of a row, at most."""
    data_rank: int
    data_ranks: int
    """Which share of the rows this process is to be given."""
    length_multiple: int
    """Of the tokens of a row."""

    def sums(self, batches: Sequence[Batch], key: Key, size: int) -> Tensor:
        """The table of `parallel.sums` over all shares, float64 [4, size] on the host. A
        collective: every rank gives as many batches, of the same shapes."""


class ExportedModel:
    """A folder that `transxssm checkpoint export` wrote."""

    data_rank, data_ranks, length_multiple = 0, 1, 1

    def __init__(
        self, folder: Path, *, dtype: str = "fp32", max_length: int = 0, device: str = ""
    ) -> None:
        """max_length 0: as the model is meant for. Raises ModelError."""
        self.name = str(folder)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.tokenizer = load_tokenizer(folder)
        self.tokenizer_json = read_tokenizer(folder / TOKENIZER)
        self.model = load_model(folder, self.device, DTYPES[dtype])
        config = self.model.config
        self.vocab_size = config.vocab_size
        self.max_length = max_length or config.max_position_embeddings
        end = config.eos_token_id
        self.end_of_text = _end_of_text(self.tokenizer, folder) if end is None else end
        self.bytes = token_bytes(self.tokenizer, config.vocab_size).to(self.device)

    @torch.no_grad()
    def sums(self, batches: Sequence[Batch], key: Key, size: int) -> Tensor:
        """See `Model`."""
        table = torch.zeros(4, size, dtype=torch.float64, device=self.device)
        for batch in (batch.to(self.device) for batch in batches):
            table += sums_by(batch, key, size, self.bytes, *self._losses(batch))
        return table.cpu()

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Nats and whether another token was likelier, [B · L]; documents run side by side."""
        tokens, labels = batch.tokens.reshape(-1), batch.labels.reshape(-1)
        by_token, missed = (torch.zeros(tokens.shape, device=self.device) for _ in range(2))
        borders = batch.cu_seqlens.tolist()
        pieces = sorted(pairwise(borders), key=lambda piece: piece[0] - piece[1])
        while pieces:
            longest = pieces[0][1] - pieces[0][0]
            together, pieces = _cut(pieces, max(1, TOKENS_AT_ONCE // longest))
            rows = tokens.new_zeros(len(together), longest)
            for row, (begin, end) in zip(rows, together, strict=True):
                row[: end - begin] = tokens[begin:end]
            hidden = self.model.hidden(rows)
            for one, (begin, end) in zip(hidden, together, strict=True):
                for at in range(begin, end, HEAD_TOKENS):
                    part = slice(at, min(at + HEAD_TOKENS, end))
                    logits = self.model.logits(one[part.start - begin : part.stop - begin])
                    by_token[part] = F.cross_entropy(logits, labels[part], reduction="none")
                    of_label = logits.gather(1, labels[part, None])[:, 0]
                    missed[part] = (of_label < logits.amax(1)).float()
        return by_token, missed


def _cut(pieces: list[Any], count: int) -> tuple[list[Any], list[Any]]:
    return pieces[:count], pieces[count:]


def _end_of_text(tokenizer: Tokenizer, folder: Path) -> int:
    found = tokenizer.token_to_id(END_OF_TEXT)
    if found is None:
        raise ModelError(
            f"{folder} names no end-of-text token, after which a text begins; set eos_token_id in "
            "its config.json"
        )
    return int(found)


class ShardedModel:
    """A checkpoint, in a layout of this job's ranks."""

    def __init__(
        self,
        step_dir: Path,
        manifest: dict[str, Any],
        launch: Launch,
        model: ModelConfig,
        parallel: ParallelConfig,
        *,
        dtype: str = "fp32",
        max_length: int = 0,
    ) -> None:
        """A collective. Raises CheckpointError or ModelError."""
        from megatron.core import parallel_state

        from checkpoints_tools.sharded import load_stored_weights
        from parallel.build import build_stage
        from parallel.compat import prepare_host
        from parallel.frozen import FrozenStage
        from parallel.groups import from_rank_0, init_distributed, init_groups

        self.name = str(step_dir)
        self.device = prepare_host(launch.local_rank)
        init_distributed(launch, self.device)
        init_groups(parallel)
        from_rank_0(lambda: _check_files(step_dir, manifest))
        self.tokenizer = load_tokenizer(step_dir)
        self.tokenizer_json = read_tokenizer(step_dir / TOKENIZER)
        self.vocab_size, self.end_of_text = model.vocab_size, manifest["eod_id"]
        self.max_length = max_length or model.max_position_embeddings
        self.length_multiple = parallel.context * parallel.tensor
        self.bytes = token_bytes(self.tokenizer, model.vocab_size).to(self.device)
        built = build_stage(
            model,
            parallel,
            seq_len=math.ceil(self.max_length / self.length_multiple) * self.length_multiple,
            dtype=DTYPES[dtype],
            seed=0,
            deterministic=False,
            device=self.device,
        )
        load_stored_weights(step_dir, FrozenStage(built))
        self.chunks = built.chunks
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_ranks = parallel_state.get_data_parallel_world_size()

    def sums(self, batches: Sequence[Batch], key: Key, size: int) -> Tensor:
        """See `Model`."""
        from parallel.context import local_batch
        from parallel.schedule import evaluate

        here = [local_batch(batch, self.device) for batch in batches]
        return evaluate(self.chunks, here, key, size, self.bytes).cpu()


def _check_files(step_dir: Path, manifest: dict[str, Any]) -> None:
    if damaged := damaged_files(step_dir, manifest):
        raise CheckpointError(
            listed([f"{step_dir / name} {what}" for name, what in sorted(damaged.items())])
        )


def evaluation_layout(
    model: ModelConfig, saved: dict[str, Any], asked: dict[str, int], world_size: int
) -> ParallelConfig:
    """What was asked of tensor, pipeline and context; else the checkpoint's own (`saved`) where it
    fits the ranks, else data parallelism alone. Raises ConfigError."""
    own = {name: int(saved.get(name, 1)) for name in ("tensor", "pipeline", "context")}
    if not asked and world_size % math.prod(own.values()):
        own = dict.fromkeys(own, 1)
    sizes = dict.fromkeys(own, 1) | asked if asked else own
    if world_size % (ranks := math.prod(sizes.values())):
        named = " × ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(
            f"a layout of {named} = {counted(ranks, 'rank')} does not divide the {world_size} of "
            f"this job; start a multiple of {ranks}"
        )
    parallel = ParallelConfig.model_validate(sizes)
    check_layout(model, parallel)
    return parallel
