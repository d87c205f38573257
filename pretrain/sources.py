"""What a run reads: its training sources and validation sets, opened, and the tokenizer they share.

Does not import Megatron-core.
"""

from collections.abc import Sequence
from pathlib import Path

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.single_gpu import ModelError
from checkpoints_tools.tokenizer_file import TOKENIZER, read_tokenizer
from data_pipeline.blend import Blend, Stage
from data_pipeline.dataset import PackedDataset, refuse_without_loss
from data_pipeline.node_cache import default_cache_dir
from data_pipeline.storage import Cache
from pretrain.config import Config, ConfigError
from pretrain.credentials import check_credentials
from pretrain.phases import Phase
from untrusted.files import write_durably
from untrusted.paths import expand_path


def open_data(config: Config) -> tuple[Blend, dict[str, PackedDataset]]:
    """Training sources and validation sets, checked against the configuration and each other.

    Raises ConfigError, UntrustedError or DataError, the last also for data in which no token has a
    loss.
    """
    data = open_blend(config)
    tokenizer = data.sources[0].tokenizer()  # missing? now rather than at the first save
    validation = {
        name: PackedDataset(
            location,
            seq_len=config.data.seq_len,
            tokenizer=tokenizer,
            cache=_cache(config),
        )
        for name, location in config.data.validation_sets.items()
    }
    for dataset in (*data.sources, *validation.values()):
        refuse_without_loss(dataset)
    return data, validation


def open_blend(config: Config) -> Blend:
    """The training sources by their weights. Raises UntrustedError or DataError."""
    check_credentials(config)
    data = config.data
    listed = [(source.path, source.seq_len or data.seq_len) for source in data.sources]
    sources = [
        PackedDataset(
            path, seq_len=seq_len, vocab_size=config.model.vocab_size, cache=_cache(config)
        )
        for path, seq_len in listed or [(data.train, data.seq_len)]
    ]
    return blend(sources, config)


def blend(sources: list[PackedDataset], config: Config) -> Blend:
    """Opened sources in the order that a configuration gives them. Raises DataError."""
    data = config.data
    return Blend(
        sources,
        seed=data.seed,
        names=[source.name for source in data.sources] or ["train"],
        stages=stages_of(config.phases),
        window_tokens=data.shuffle_window,
    )


def stages_of(phases: Sequence[Phase]) -> list[Stage]:
    """The phases as a blend knows them."""
    return [Stage(phase.first_sample, phase.weights) for phase in phases]


def _cache(config: Config) -> Cache:
    data = config.data
    try:
        cache_dir = expand_path(data.cache_dir)
    except ValueError as error:
        raise ConfigError(f"data.cache_dir={data.cache_dir}: {error}") from error
    return Cache(
        Path(cache_dir) if data.cache_dir else default_cache_dir(),
        int(data.cache_gib * 2**30),
        data.download_attempts,
        data.download_timeout,
    )


def keep_tokenizer(data: Blend, run_dir: Path) -> Path:
    """The data's tokenizer.json in the run directory, from where checkpoints take it."""
    path = run_dir / "tokenizer.json"
    write_durably(path, data.sources[0].tokenizer())
    return path


def tokenizer_differences(folder: Path, data: Blend) -> list[str]:
    """How the tokenizer of a checkpoint or export differs from the data's, in a line; none for the
    same tokenizer, whatever its file. Raises CheckpointError for a file that is none."""
    file, source = folder / TOKENIZER, data.sources[0]
    try:
        different = source.differing_tokenizer(read_tokenizer(file))
    except ModelError as error:
        raise CheckpointError(str(error)) from error
    line = f"{file} and {source.tokenizer_name} differ in {', '.join(different)}"
    return [line] if different else []
