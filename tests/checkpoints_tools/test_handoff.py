"""What fine-tuners do with an export: each equals the plain call. The whole list, with the real
libraries, is benchmarks.handoff; here their hold on the model is imitated, without them."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.checkpoints_tools.test_hugging_face import SPECIAL, VOCAB, export, load, prompt, wrap
from tests.checkpoints_tools.tiny_models import make_model, pad_left

pytest.importorskip("transformers")

from transformers import Trainer

KINDS = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
IDS = torch.tensor([prompt(19, 1), prompt(19, 2)])
ROWS = [torch.tensor(prompt(n, n)) for n in (19, 7)]


def tiny(tied: bool = True) -> Any:
    changes = {"ssd_conv_width": 4, "ssd_skip": True, "tie_word_embeddings": tied}
    return wrap(make_model(vocab_size=VOCAB, **SPECIAL, **changes))


def gradients(model: Any, **arguments: Any) -> dict[str, Tensor]:
    model.train().zero_grad()
    model(**arguments).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)


def test_trainer_can_add_to_the_keys_it_ignores() -> None:
    model = tiny()
    keys = model.config.keys_to_ignore_at_inference
    assert [*keys, "loss"] == keys + ["loss"]  # noqa: RUF005  (what Trainer.predict does)
    trainer: Any = object.__new__(Trainer)
    trainer.model = model
    trainer.label_names, trainer.can_return_loss = ["labels"], False
    trainer._prepare_inputs = lambda inputs: inputs
    trainer.compute_loss_context_manager = torch.no_grad
    trainer.compute_loss = lambda model, inputs, **_: (lambda output: (output.loss, output))(
        model(**inputs)
    )
    trainer._get_num_items_in_batch = lambda *_: None
    trainer.args = type("Arguments", (), {"past_index": -1, "device": "cpu"})()
    inputs = {"input_ids": IDS, "labels": IDS}
    loss, logits, _ = trainer.prediction_step(model, inputs, prediction_loss_only=False)
    expected = model(IDS, labels=IDS)
    assert torch.equal(logits, expected.logits)
    assert torch.equal(loss, expected.loss)


@KINDS
def test_every_weight_is_read_inside_its_module(tied: bool) -> None:
    """As offloading has it: weights are there only while their module is called."""
    model = tiny(tied)
    with torch.no_grad():
        expected = model(IDS).logits
    stored = {m: dict(m.named_parameters(recurse=False)) for m in model.modules()}

    def there(module: nn.Module, *_: Any) -> None:
        for name, p in stored[module].items():
            setattr(module, name, p)

    def away(module: nn.Module, *_: Any) -> None:
        for name, p in stored[module].items():
            setattr(module, name, nn.Parameter(torch.full_like(p, float("nan"))))

    for module in stored:
        module.register_forward_pre_hook(there)
        module.register_forward_hook(away)
        away(module)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)


class Adapted(nn.Module):
    """A LoRA around a linear module, as PEFT puts it there."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(0.1 * torch.ones(2, base.in_features))
        self.up = nn.Parameter(0.1 * torch.ones(base.out_features, 2))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


@KINDS
def test_adapter_of_the_head_trains(tied: bool) -> None:
    model = tiny(tied)
    assert model.get_output_embeddings() is model.lm_head
    with torch.no_grad():
        output = model(IDS, output_hidden_states=True)
        added = output.hidden_states[-1] @ torch.full((24, VOCAB), 0.02)
    model.lm_head = adapter = Adapted(model.lm_head)
    found = model.train()(IDS, labels=IDS)
    torch.testing.assert_close(found.logits, output.logits + added)
    found.loss.backward()
    for p in (adapter.down, adapter.up):
        assert p.grad is not None
        assert p.grad.abs().max() > 0


def test_tied_head_goes_where_the_embedding_is(tmp_path: Path) -> None:
    from checkpoints_tools.hugging_face_model import TransXSSMForCausalLM as Model

    seen: list[Any] = []

    @classmethod
    def record(cls: Any, *arguments: Any, **named: Any) -> None:
        seen.append(named["device_map"])

    config = type("Config", (), {"tie_word_embeddings": True})()
    for given, expected in (
        ({"model.word_embed": "disk", "model.layers": 0}, "disk"),
        ({"model.word_embed": 1, "lm_head": "disk"}, 1),
        ({"": "cpu"}, "cpu"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Model.__mro__[1], "from_pretrained", record)
            Model.from_pretrained(tmp_path, config=config, device_map=given)
        assert seen[-1] == given | {"lm_head": expected}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = tiny()
    expected = gradients(model, input_ids=IDS, labels=IDS)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    model.model.layers[0].feed_forward.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_equal(gradients(model, input_ids=IDS, labels=IDS), expected)
    assert len(calls) == 2
    assert model(IDS, use_cache=True).past_key_values is None


@KINDS
def test_embeddings_as_input_give_the_same(tied: bool) -> None:
    model = tiny(tied)
    expected = gradients(model, input_ids=IDS, labels=IDS)
    embedded = model.get_input_embeddings()(IDS)
    assert_equal(gradients(model, inputs_embeds=embedded, labels=IDS), expected)
    ids, mask = pad_left(ROWS, filler=1)
    model.eval()
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    tokens = model.generate(ids, **settings)
    embedded = model.get_input_embeddings()(ids).detach()
    found = model.generate(inputs_embeds=embedded, **settings)
    assert torch.equal(found, tokens[:, ids.shape[1] :])


def test_hidden_states_are_those_of_layers_and_head() -> None:
    model = tiny()
    with torch.no_grad():
        output = model(IDS, output_hidden_states=True)
        assert len(output.hidden_states) == 4
        assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(IDS))
        assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
        assert torch.equal(output.logits, model(IDS).logits)
        made = model.generate(
            IDS, max_new_tokens=3, min_new_tokens=3, output_hidden_states=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert [len(step) for step in made.hidden_states] == [4, 4, 4]


@KINDS
@pytest.mark.parametrize("mean_resizing", [True, False])
def test_resized_embeddings_keep_the_old_tokens(
    tied: bool, mean_resizing: bool, tmp_path: Path
) -> None:
    model = tiny(tied)
    with torch.no_grad():
        expected = model(IDS).logits
        model.resize_token_embeddings(VOCAB + 3, mean_resizing=mean_resizing)
        found = model(IDS).logits
        torch.testing.assert_close(found[..., :VOCAB], expected)
        assert found.shape[-1] == model.config.vocab_size == VOCAB + 3
        assert (model.lm_head.weight is model.model.word_embed.weight) == tied
        model.save_pretrained(tmp_path)
        ids = IDS.clone()
        ids[0, 3] = VOCAB + 2
        assert torch.equal(load(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 19])
def test_prompt_read_in_pieces_gives_the_same_tokens(length: int) -> None:
    model = tiny()
    settings = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(IDS[:, :length], **settings)
    assert torch.equal(model.generate(IDS[:, :length], prefill_chunk_size=3, **settings), expected)


def test_padded_prompt_read_in_pieces_gives_the_same_tokens() -> None:
    model = tiny()
    ids, mask = pad_left(ROWS, filler=1)
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, prefill_chunk_size=3, **settings), expected)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    assert torch.equal(model.generate(ids, position_ids=positions, **settings), expected)


def test_positions_that_follow_from_the_mask_are_taken() -> None:
    model = tiny()
    ids, mask = pad_left(ROWS, filler=1)
    of_mask = mask.cumsum(-1) - 1
    plain = torch.arange(19)[None]
    with torch.no_grad():
        expected, padded = model(ids).logits, model(ids, attention_mask=mask).logits
        for given in (plain, plain.expand(2, -1)):
            assert torch.equal(model(ids, position_ids=given).logits, expected)
        for filler in (0, 1):
            given = of_mask.masked_fill(mask == 0, filler)
            found = model(ids, attention_mask=mask, position_ids=given).logits
            assert torch.equal(found, padded)
        memory = model(ids[:, :15], attention_mask=mask[:, :15]).past_key_values
        rest = {"attention_mask": mask, "position_ids": of_mask[:, 15:]}
        model(ids[:, 15:], past_key_values=memory, **rest)
    packed = torch.cat([torch.arange(9), torch.arange(10)])[None]
    for wrong in (packed, plain + 1, plain[:, 1:]):
        with pytest.raises(ValueError, match="position_ids are others than follow"):
            model(ids, position_ids=wrong)
    with pytest.raises(ValueError, match="position_ids are others than follow"):
        model(ids, attention_mask=mask, position_ids=plain)


def test_scan_stays_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    from checkpoints_tools import single_gpu

    monkeypatch.setattr(single_gpu, "kernels_ssd", lambda: None)
    original, seen = single_gpu.chunked_scan, []

    def watched(*arguments: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return original(*arguments)

    monkeypatch.setattr(single_gpu, "chunked_scan", watched)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert tiny()(IDS).logits.isfinite().all()
    assert seen == [False, False]


def test_rounded_decay_is_warned_of() -> None:
    model = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS)
    with pytest.warns(UserWarning, match=r"A_log, dt_bias and D are torch.bfloat16, not float32"):
        model.to(torch.bfloat16)(IDS)


def test_mixed_precision_of_fsdp_does_not_round_the_angles() -> None:
    """It casts tensors in arguments of layers, also those in tuples and dataclasses."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import _cast_fp_tensor
    from torch.distributed.utils import _apply_to_tensors
    from torch.utils._pytree import tree_map

    def cast(x: Any) -> Any:
        return _cast_fp_tensor(torch.bfloat16, x) if isinstance(x, Tensor) else x

    seen: list[Any] = []
    model = tiny()
    model.model.layers[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    model(IDS)
    for arguments in (tree_map(cast, seen[0]), _apply_to_tensors(cast, seen[0])):
        assert arguments[0].dtype == torch.bfloat16
        angles = arguments[1]
        tables = angles if isinstance(angles, tuple) else (angles.cos, angles.sin)
        assert [table.dtype for table in tables] == [torch.float32] * 2


def test_decay_is_float32_in_a_model_built_in_bfloat16() -> None:
    config = tiny().config
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = type(tiny())(config)
    finally:
        torch.set_default_dtype(before)
    wide = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {f"model.layers.{i}.ssd.{n}" for i in (0, 2) for n in ("A_log", "dt_bias", "D")}


def test_index_of_offloaded_weights_is_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4.57 leaves out a tied head, and rounds float32 weights to the others' dtype."""
    model = tiny()
    index = {
        name: {"safetensors_file": "f", "weight_name": name, "dtype": "bfloat16"}
        for name in ("model.word_embed.weight", "model.layers.0.ssd.A_log")
    }
    base = type(model).__mro__[1]
    loaded = classmethod(lambda cls, *_, **__: (model, [], index, []))
    monkeypatch.setattr(base, "_load_pretrained_model", loaded, raising=False)
    type(model)._load_pretrained_model(model, None)
    assert index["lm_head.weight"] == index["model.word_embed.weight"]
    assert index["model.layers.0.ssd.A_log"]["dtype"] == "float32"
    assert index["model.word_embed.weight"]["dtype"] == "bfloat16"


def test_saved_folder_of_a_tied_model_has_no_head(tmp_path: Path) -> None:
    from safetensors import safe_open

    (tmp_path / "source").mkdir()
    export(tmp_path / "source")
    load(tmp_path / "source").save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved/model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
