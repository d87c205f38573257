"""The loss of a model on its validation sets, while it trains."""

from collections.abc import Callable
from itertools import islice

import torch
from megatron.core import parallel_state
from torch import Tensor

from data_pipeline.dataset import PackedDataset
from data_pipeline.loader import sequential_batches
from parallel.context import local_batch
from parallel.groups import largest_of_all
from parallel.schedule import evaluate
from parallel.sums import by_position
from parallel.zero import ZeroOptimizer
from pretrain import stop
from pretrain.config import Config
from pretrain.evaluation.scores import Scores, by_bins


def validate(
    config: Config,
    zero: ZeroOptimizer,
    datasets: dict[str, PackedDataset],
    token_bytes: Tensor,
    progress: Callable[[], None],
) -> dict[str, float] | None:
    """The mean loss per token in nats over eval_batches global batches (or all there is) of each
    set: of all sets together, by position, and of each set where they have names. None if any rank
    was asked to stop. A collective.

    The samples do not depend on the layout. token_bytes float64 [vocab_size]; progress is called
    before every batch.
    """
    training, seq_len = config.training, config.data.seq_len
    tables, device = {}, token_bytes.device
    ranks = parallel_state.get_data_parallel_world_size()
    micro_batches = training.global_batch_size // (training.micro_batch_size * ranks)
    zero.set_no_sync(False)
    for name, dataset in datasets.items():
        batches = sequential_batches(
            dataset,
            training.micro_batch_size,
            training.eval_batches * training.global_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=ranks,
        )
        tables[name] = torch.zeros(4, seq_len, dtype=torch.float64, device=device)
        while read := [local_batch(b, device) for b in islice(batches, micro_batches)]:
            progress()
            if largest_of_all(int(stop.requested() is not None)):
                return None
            modules = zero.scheduled_modules
            tables[name] += evaluate(modules, read, by_position, seq_len, token_bytes)
    table = torch.stack(list(tables.values())).sum(0)
    scores = Scores.of(table)
    return (
        {
            "validation_loss": scores.loss,
            "validation_perplexity": scores.perplexity,
            "validation_bits_per_byte": scores.bits_per_byte,
        }
        | {f"validation_loss_{name}": Scores.of(t).loss for name, t in tables.items() if name}
        | {f"validation_loss_from_{bin_[0]}": s.loss for bin_, s in by_bins(table).items()}
    )
