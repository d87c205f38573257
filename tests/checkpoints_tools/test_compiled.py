"""An export under torch.compile, and its static cache: each equals the eager, dynamic call."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from tests.checkpoints_tools.test_hugging_face import SPECIAL, VOCAB, prompt, wrap
from tests.checkpoints_tools.tiny_models import VARIANTS, make_model, pad_left

pytest.importorskip("transformers")

from transformers import CompileConfig

from checkpoints_tools.hugging_face_model import GenerationCache

BOUND = 1e-5  # of the largest difference, relative to the largest value; float32
KINDS = {
    "mixed": {"ssd_conv_width": 4, "ssd_skip": True},
    **{name: VARIANTS[name] for name in ("no-attention", "attention-alone")},
}
NEW_TOKENS = 8


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def tiny(kind: str = "mixed") -> Any:
    changes = KINDS[kind] if kind in KINDS else VARIANTS[kind]
    return wrap(make_model(vocab_size=VOCAB, **SPECIAL, **changes))


def batch(length: int, *, padded: bool) -> dict[str, Tensor]:
    """Three rows; padded: on the left, the last two to other lengths."""
    lengths = [length, max(1, length // 2), 1] if padded else [length] * 3
    ids, mask = pad_left([torch.tensor(prompt(n, i)) for i, n in enumerate(lengths)], filler=1)
    return {"input_ids": ids, "attention_mask": mask} if padded else {"input_ids": ids}


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def training_step(call: Any, model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits at real tokens and the gradient of every parameter."""
    model.zero_grad()
    labels = inputs["input_ids"]
    if "attention_mask" in inputs:
        labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    output = call(**inputs, labels=labels)
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    return found | {"logits": output.logits.detach()[labels != -100]}


PADDED = pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
EVERY_KIND = pytest.mark.parametrize(
    ("kind", "padded"), [("mixed", False), *((kind, True) for kind in KINDS)]
)


@EVERY_KIND
def test_compiled_forward_and_backward_equal_eager(kind: str, padded: bool) -> None:
    model = tiny(kind).train()
    inputs = batch(37, padded=padded)  # two chunks and a short one
    expected = training_step(model, model, inputs)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(2):
        found = training_step(compiled, model, inputs)
        assert max(difference(found[name], expected[name]) for name in expected) < BOUND
    assert counter.frame_count == 1


@PADDED
def test_forward_is_one_graph(padded: bool) -> None:
    explained = torch._dynamo.explain(tiny())(**batch(9, padded=padded))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_compiled_graph_refuses_other_positions() -> None:
    inputs = batch(9, padded=True)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    model = tiny()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(**inputs, position_ids=positions).logits
        assert difference(found, model(**inputs).logits) < BOUND
        with pytest.raises(RuntimeError, match="position_ids are others than follow"):
            compiled(**inputs, position_ids=positions + 1)


# ------------------------------------------------------------------------------- static caches


def generated(model: Any, inputs: dict[str, Tensor], **arguments: Any) -> Tensor:
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    tokens: Tensor = model.generate(**inputs, **settings, **arguments)
    return tokens


@pytest.mark.parametrize(
    ("kind", "length", "padded"),
    [("mixed", n, padded) for n in (1, 5, 17) for padded in (False, True)]
    + [(kind, 17, True) for kind in (*KINDS, "rival") if kind != "mixed"],
)
def test_static_cache_generates_the_same_tokens(kind: str, length: int, padded: bool) -> None:
    model, inputs = tiny(kind), batch(length, padded=padded)
    for arguments in ({}, {"num_beams": 3}, {"prefill_chunk_size": 3}):
        expected = generated(model, inputs, **arguments)
        found = generated(model, inputs, cache_implementation="static", **arguments)
        assert torch.equal(found, expected), arguments


def test_static_cache_is_allocated_once_and_written_in_place() -> None:
    model, inputs = tiny(), batch(17, padded=True)
    cache = GenerationCache(model.checked, 20)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)

    def step(ids: Tensor) -> list[tuple[int, torch.Size]]:
        model(ids, attention_mask=mask, past_key_values=cache)
        tensors = [t for part in (cache, *cache.layers) for t in vars(part).values()]
        return [(t.data_ptr(), t.shape) for t in tensors if isinstance(t, Tensor)]

    with torch.no_grad():
        before = step(inputs["input_ids"])
        for i in range(3):
            assert cache.get_seq_length() == 17 + i
            assert step(inputs["input_ids"][:, i : i + 1]) == before
    # one length; keys, values and their length in one layer; state and tail in two
    assert len(before) == 1 + 3 + 2 * 2
    assert [shape[2] for _, shape in before if len(shape) == 4].count(20) == 2
    assert cache.get_max_cache_shape() == 20


def test_generation_allocates_what_it_needs() -> None:
    model = tiny()
    arguments = {"cache_implementation": "static", "return_dict_in_generate": True}
    lengths = []
    for n in (5, 17, 5):
        output: Any = generated(model, batch(n, padded=True), **arguments)
        lengths.append(output.past_key_values.layers[1].keys.shape[2])
    # the last token is not read; later caches are as long as earlier ones
    assert lengths == [5 + NEW_TOKENS - 1, 17 + NEW_TOKENS - 1, 17 + NEW_TOKENS - 1]


@EVERY_KIND
def test_one_compiled_step_serves_every_token(kind: str, padded: bool) -> None:
    model, inputs = tiny(kind), batch(17, padded=padded)
    capacity = 17 + NEW_TOKENS
    rest = torch.tensor([prompt(NEW_TOKENS, 9)]).expand(3, -1)
    mask = inputs.get("attention_mask", torch.ones(3, 17, dtype=torch.long))
    mask = torch.nn.functional.pad(mask, (0, NEW_TOKENS), value=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    given = {"attention_mask": mask} if padded else {}
    with torch.no_grad():
        whole = model(torch.cat([inputs["input_ids"], rest], dim=1), attention_mask=mask).logits
        cache = GenerationCache(model.checked, capacity)
        model(inputs["input_ids"], past_key_values=cache, **given)
        for i in range(NEW_TOKENS):
            step = compiled(rest[:, i : i + 1], past_key_values=cache, **given).logits
            assert difference(step, whole[:, 17 + i : 18 + i]) < BOUND
    assert counter.frame_count == 1


def test_generate_compiles_its_step_once() -> None:
    """As it does by itself on a GPU: `_compile_all_devices` has it do so here."""
    model = tiny()
    compiling = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiling._compile_all_devices = True
    arguments = {"cache_implementation": "static", "compile_config": compiling}
    for n in (17, 5, 1):  # a prompt that needs no longer cache needs no other graph
        inputs = batch(n, padded=True)
        assert torch.equal(generated(model, inputs, **arguments), generated(model, inputs))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_static_cache_refuses_what_it_has_no_room_for() -> None:
    model, inputs = tiny(), batch(17, padded=True)
    cache = GenerationCache(model.checked, 20)
    with pytest.raises(ValueError, match=r"expected \(3, 20\): one value for each of 20 tokens"):
        model(**inputs, past_key_values=cache)
    with pytest.raises(ValueError, match="has room for 20 tokens, too few for 21"):
        generated(model, inputs, past_key_values=cache)
