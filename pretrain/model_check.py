"""Warnings of models that can be trained, and that are probably not what was meant."""

from contextlib import suppress
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.meta import META, parse_meta
from parallel.config import ModelConfig
from pretrain.config import Config
from untrusted.files import read_regular

MAX_BYTES = 1 << 20
UNUSED_SHARE, UNUSED_TOKENS = 0.25, 1000  # of the vocabulary; fewer are padding


def model_warnings(model: ModelConfig, tokens: int | None) -> list[str]:
    """Return a sentence for each peculiarity.

    tokens: of the data's tokenizer, where it is known.
    """
    found = []
    period, offset = model.attn_layer_period, model.attn_layer_offset
    has_attention = any(model.is_attention(layer) for layer in range(model.num_layers))
    is_meant = offset == period and "attn_layer_offset" in model.model_fields_set
    if not has_attention and not is_meant:
        first = f"the first would be layer {offset}, counted from 0"
        found.append(
            f"none of the {model.num_layers} layers is attention: with model.attn_layer_period="
            f"{period} and model.attn_layer_offset={offset} "
            f"{first if offset < period else 'no layer is'}; use an offset of at most "
            f"{min(period, model.num_layers) - 1}, or set model.attn_layer_offset={period}, the "
            "period, for a model of state-space layers only"
        )
    unused = 0 if tokens is None else model.vocab_size - tokens
    if unused >= UNUSED_TOKENS and unused > UNUSED_SHARE * model.vocab_size:
        matrices = 1 if model.tie_word_embeddings else 2
        found.append(
            f"model.vocab_size={model.vocab_size:,}, but the data's tokenizer has {tokens:,} "
            f"tokens: {unused * model.hidden_size * matrices:,} parameters are of ids that never "
            f"occur; set model.vocab_size={tokens}, or a little more"
        )
    return found


def tokens_of_data(config: Config) -> int | None:
    """Return the size of the vocabulary of prepared data on this machine, or None."""
    folders = [config.data.train] if config.data.train else [s.path for s in config.data.sources]
    for folder in folders:
        with suppress(OSError, ValueError, DataError):  # training says what is wrong with the data
            return parse_meta(read_regular(Path(folder) / META, MAX_BYTES), folder).vocab_size
    return None
