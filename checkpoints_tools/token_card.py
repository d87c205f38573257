"""The section of a model card on tokens: what a person who fine-tunes the model has to know."""

from pathlib import Path

from checkpoints_tools.single_gpu import TransXSSMConfig
from checkpoints_tools.tokenizer_file import parse_tokenizer, read_tokenizer

SECTION = """## Tokens

- **End of text.** In training every document ended with {end}, and nothing stood in front of it.
  `tokenizer(text)` adds neither: append `tokenizer.eos_token` to each example, so that the model
  goes on learning where to stop.{begin}
- **Special tokens in a text.** The training data had none: what spells one, such as {spelt}, was
  ordinary text there. Here it becomes the token, as elsewhere in transformers.
  `tokenizer(text, split_special_tokens=True)` gives the ids of the training data; use it for text
  that others wrote.
- **Padding** is {pad}, on the left.{mask}
- **New tokens** become one id each, from {known:,} on:
  `tokenizer.add_special_tokens({{"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}})`.
  {rows} Rows of new tokens are untrained: train the embeddings (PEFT: name them in
  `modules_to_save`), and for a chat put the id that ends a turn into
  `generation_config.eos_token_id`.
"""


def token_section(config: TransXSSMConfig, tokenizer_json: Path) -> str:
    """The section, as Markdown. Raises ModelError for what is no tokenizer."""
    tokenizer = parse_tokenizer(read_tokenizer(tokenizer_json), tokenizer_json)
    known = max(tokenizer.get_vocab().values(), default=-1) + 1

    def named(token_id: int | None) -> str:
        if token_id is None:
            return "not set"
        return f"`{tokenizer.id_to_token(token_id)}` (id {token_id})"

    begin = mask = ""
    if config.bos_token_id is not None and config.bos_token_id == config.eos_token_id:
        begin = " It is `bos_token` too, which `generate` begins with when there is no prompt."
    if config.pad_token_id == config.eos_token_id:
        mask = (
            " That is the end of text itself: mask the labels of padding by the attention mask, "
            "not by the id, or the model does not learn to stop."
        )
    free = config.vocab_size - known
    if free > 0:
        rows = (
            f"The model has {config.vocab_size:,} rows, so that {free:,} new tokens need no "
            "`resize_token_embeddings`."
        )
    else:
        rows = "Then call `model.resize_token_embeddings(len(tokenizer))`."
    return SECTION.format(
        end=named(config.eos_token_id),
        begin=begin,
        spelt=f"`{tokenizer.id_to_token(config.eos_token_id or 0)}`",
        pad=named(config.pad_token_id),
        mask=mask,
        known=known,
        rows=rows,
    )
