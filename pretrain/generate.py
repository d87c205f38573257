"""Text generation with a single-GPU model: prefill the prompt once, then one token at a time.

p = softmax(logits / temperature), cut to the top_k most probable tokens, renormalised, cut to
the fewest most probable tokens whose probabilities reach top_p, renormalised; temperature 0
takes the most probable token. Reported log-probabilities are those of softmax(logits) itself.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer  # type: ignore[import-untyped]
from torch import Tensor

from checkpoints_tools.model_folder import load_model
from checkpoints_tools.single_gpu import Cache, ModelError, TransXSSM
from checkpoints_tools.tokenizer_file import TOKENIZER, parse_tokenizer, read_tokenizer
from untrusted.errors import UserError
from untrusted.numbers import counted
from untrusted.text import without_controls
from untrusted.tokenizer_json import as_in_training

END_OF_TEXT = "<|endoftext|>"
REPLACEMENT = "\ufffd"
MAX_PENDING = 3  # a UTF-8 character has four bytes, so at most three can wait for the rest


class RequestError(UserError, ValueError):
    """What was asked for cannot be generated; the message names the value and what to use."""


@torch.no_grad()
def generate(
    model: TransXSSM,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_token_id: int | None = None,
    on_token: Callable[[int], None] | None = None,
) -> tuple[list[int], list[float]]:
    """New token ids and their natural log-probabilities; an end-of-text token is the last of them.

    top_k=0 keeps all tokens. The seed makes sampling reproducible; None draws a fresh one.
    """
    _check(max_new_tokens, temperature, top_k, top_p)
    vocab = model.config.vocab_size
    if not prompt_ids:
        raise RequestError("the prompt has no tokens; start from the end-of-text token")
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab:
        raise RequestError(
            f"the prompt has token ids from {min(prompt_ids)} to {max(prompt_ids)}, but the model "
            f"has vocab_size={vocab}: is this its tokenizer?"
        )
    device = model.model.word_embed.weight.device
    # Drawn on the host, so that a seed means the same on every device.
    rng = torch.Generator()
    if seed is None:
        rng.seed()
    else:
        rng.manual_seed(seed)
    cache = Cache(model.config)
    token_ids: list[int] = []
    logprobs: list[float] = []
    inputs = list(prompt_ids)
    for _ in range(max_new_tokens):
        hidden = model.hidden(torch.tensor([inputs], device=device), cache)
        logits = model.logits(hidden[:, -1]).squeeze(0).cpu()  # [vocab]
        if not bool(torch.isfinite(logits).all()):
            raise ModelError(
                f"the model's logits are not finite after {counted(cache.length, 'token')}: its "
                "weights hold NaN or overflow in this dtype."
            )
        token = choose(logits, temperature, top_k, top_p, rng)
        token_ids.append(token)
        logprobs.append(float(logits.log_softmax(-1)[token]))
        if on_token is not None:
            on_token(token)
        if token == eos_token_id:
            break
        inputs = [token]
    return token_ids, logprobs


def _check(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    if max_new_tokens < 1:
        raise RequestError(f"max_new_tokens={max_new_tokens}: at least 1 token must be asked for")
    if not 0 <= temperature < float("inf"):
        raise RequestError(f"temperature={temperature}: use 0 (greedy) or a positive number")
    if top_k < 0:
        raise RequestError(f"top_k={top_k}: use 0 (all tokens) or a positive number")
    if not 0 < top_p <= 1:
        raise RequestError(f"top_p={top_p}: use a number above 0 and at most 1 (all tokens)")


def choose(
    logits: Tensor, temperature: float, top_k: int, top_p: float, rng: torch.Generator
) -> int:
    """One token id drawn from float32 logits [vocab]."""
    if temperature == 0:
        return int(logits.argmax())
    ordered, ids = logits.sort(descending=True, stable=True)
    if top_k:
        ordered, ids = ordered[:top_k], ids[:top_k]
    # The maximum goes first: dividing it by a tiny temperature would overflow.
    probs = ((ordered.double() - ordered[0]) / temperature).softmax(-1)
    before = probs.cumsum(-1) - probs  # probability of all better tokens
    probs = torch.where(before < top_p, probs, 0.0)
    return int(ids[torch.multinomial(probs, 1, generator=rng)])


class TextStream:
    """Turns token ids into text as they come, never cutting a character in two.

    A byte-level token may hold part of a UTF-8 character, which decodes to U+FFFD until the rest
    arrives: such a tail waits. `push`es and the final `flush` join to the decoding of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.window = 0  # decoding starts here: one settled step back, as some decoders need
        self.settled = 0  # ids before this one end on a whole character
        self.shown = 0  # characters of the window's text already given out

    def push(self, token_id: int) -> str:
        """The text that this token completes, perhaps none."""
        self.ids.append(token_id)
        text = self._decode()
        tail = len(text) - len(text.rstrip(REPLACEMENT))
        whole = len(text) - min(tail, MAX_PENDING)
        new = text[self.shown : whole]
        self.shown = max(self.shown, whole)
        if not tail:
            self.window, self.settled = self.settled, len(self.ids)
            self.shown = len(self._decode())
        return new

    def flush(self) -> str:
        """What is left at the end: a character that was never completed."""
        text = self._decode()
        new, self.shown = text[self.shown :], len(text)
        return new

    def _decode(self) -> str:
        return str(self.tokenizer.decode(self.ids[self.window :], skip_special_tokens=True))


def run(
    model_dir: str | Path,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    json_output: bool = False,
) -> None:
    """Generate from the model in a folder; stream the text to stdout, or print one JSON object."""
    _check(max_new_tokens, temperature, top_k, top_p)  # before minutes of loading
    tokenizer = load_tokenizer(model_dir)
    model = load_model(model_dir, device, dtype)
    eos = model.config.eos_token_id
    if eos is None:
        eos = tokenizer.token_to_id(END_OF_TEXT)
    # Documents are prepared without the tokenizer's own additions, and so are prompts.
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    if not prompt_ids:
        if eos is None:
            raise ModelError(
                f"The prompt is empty and {model_dir} names no end-of-text token to start from: "
                "give a prompt, or set eos_token_id in its config.json."
            )
        prompt_ids = [eos]
    limit = model.config.max_position_embeddings
    if len(prompt_ids) + max_new_tokens > limit:
        print(
            f"warning: {len(prompt_ids)} prompt tokens and {max_new_tokens} new ones may go past "
            f"the {limit} positions the model is meant for (max_position_embeddings)",
            file=sys.stderr,
        )
    stream = TextStream(tokenizer)

    def show(token_id: int) -> None:
        sys.stdout.write(without_controls(stream.push(token_id)))
        sys.stdout.flush()

    token_ids, logprobs = generate(
        model,
        prompt_ids,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_token_id=eos,
        on_token=None if json_output else show,
    )
    if json_output:
        text = tokenizer.decode(token_ids, skip_special_tokens=True)
        record = {"prompt_ids": prompt_ids, "token_ids": token_ids, "logprobs": logprobs}
        print(json.dumps({**record, "text": text}))
    else:
        print(without_controls(stream.flush()))


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    """Return the tokenizer of a folder, as training data is prepared with it. Raises ModelError."""
    path = Path(model_dir) / TOKENIZER
    return as_in_training(parse_tokenizer(read_tokenizer(path), path))
