"""The single-GPU model against the float64 oracle, and its caches."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints_tools import single_gpu
from checkpoints_tools.single_gpu import Cache, TransXSSMConfig
from tests.checkpoints_tools.tiny_models import (
    LLAMA3,
    TINY,
    VARIANTS,
    YARN,
    make_model,
    make_tokens,
    pad_left,
)
from tests.oracle import model_logits, rope_frequency


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=["own-scan", "kernels"])
def scan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the file's own scan, and with the kernels package."""
    if request.param == "own-scan":
        monkeypatch.setattr(single_gpu, "kernels_ssd", lambda: None)
    else:
        assert single_gpu.kernels_ssd() is not None  # ours is in this repository
    return str(request.param)


# ------------------------------------------------------------------------------------ forward


@pytest.mark.usefixtures("scan")
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_matches_oracle(variant: str) -> None:
    model = make_model(**VARIANTS[variant])
    tokens = make_tokens(1, 37)  # two chunks of 16 and a short one
    logits = model(tokens)[0]
    config = json.loads(model.config.to_json())
    expected = model_logits(model.state_dict(), config, tokens[0].tolist())
    assert logits.dtype == torch.float32
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("scan")
@pytest.mark.parametrize("variant", ["grouped", "rival", "yarn", "P8-N12"])
@pytest.mark.parametrize("pieces", [[1] * 20, [7, 1, 1, 6, 2, 3], [17, 3]], ids=str)
def test_decoding_in_pieces_matches_full_forward(variant: str, pieces: list[int]) -> None:
    model = make_model(**VARIANTS[variant])
    tokens = make_tokens(2, 20)
    cache = Cache(model.config)
    logits = torch.cat([model(piece, cache) for piece in tokens.split(pieces, dim=1)], dim=1)
    assert cache.length == 20
    torch.testing.assert_close(logits, model(tokens), rtol=1e-4, atol=1e-4)


def test_long_decoding_outgrows_the_first_buffers() -> None:
    model = make_model()
    tokens = make_tokens(1, 200)
    cache = Cache(model.config)
    pieces = [model(piece, cache) for piece in tokens.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trains", [True, False])
def test_only_training_attends_by_cudnn(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    attend, allowed = torch.nn.functional.scaled_dot_product_attention, []

    def watched(*inputs: Any, **options: Any) -> torch.Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*inputs, **options)

    monkeypatch.setattr(single_gpu.F, "scaled_dot_product_attention", watched)
    model = make_model()
    with torch.set_grad_enabled(trains):
        model(make_tokens(1, 5))
    assert allowed == [trains]
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.usefixtures("scan")
def test_batch_equals_one_by_one() -> None:
    model = make_model(ssd_conv_width=4)
    tokens = make_tokens(3, 21)
    single = torch.cat([model(row[None]) for row in tokens])
    torch.testing.assert_close(model(tokens), single, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("scan")
@pytest.mark.parametrize("variant", VARIANTS)
def test_left_padded_rows_equal_rows_alone(variant: str) -> None:
    model = make_model(**VARIANTS[variant])
    rows = [make_tokens(1, length, seed=length)[0] for length in (21, 1, 17)]
    tokens, mask = pad_left(rows, filler=0)
    logits = model(tokens, attention_mask=mask)
    for row, found in zip(rows, logits, strict=True):
        torch.testing.assert_close(found[-len(row) :], model(row[None])[0], rtol=1e-4, atol=1e-4)
    other, _ = pad_left(rows, filler=7)  # what the padding holds changes no bit
    again = model(other, attention_mask=mask)
    assert torch.equal(again[mask.bool()], logits[mask.bool()])
    assert torch.equal(model(tokens, attention_mask=torch.ones_like(mask)), model(tokens))


@pytest.mark.usefixtures("scan")
@pytest.mark.parametrize("variant", ["grouped", "rival", "yarn", "attention-alone"])
@pytest.mark.parametrize("pieces", [[1] * 24, [20, 1, 1, 2], [3, 17, 4]], ids=str)
def test_left_padded_rows_decode_in_pieces(variant: str, pieces: list[int]) -> None:
    model = make_model(**VARIANTS[variant])
    rows = [make_tokens(1, length, seed=length)[0] for length in (24, 9, 22)]
    tokens, mask = pad_left(rows, filler=0)
    cache, found = Cache(model.config), []
    for piece in tokens.split(pieces, dim=1):
        so_far = mask[:, : cache.length + piece.shape[1]]
        found.append(model(piece, cache, attention_mask=so_far))
    logits = torch.cat(found, dim=1)
    for i, row in enumerate(rows):
        alone = model(row[None])[0]
        torch.testing.assert_close(logits[i, -len(row) :], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("scan")
def test_padding_between_cached_turns_is_skipped() -> None:
    model, tokens = make_model(), make_tokens(1, 20)
    spread = torch.cat([tokens[:, :9], make_tokens(1, 4, seed=1), tokens[:, 9:]], dim=1)
    mask = torch.ones_like(spread)
    mask[:, 9:13] = 0
    cache = Cache(model.config)
    model(spread[:, :9], cache)
    found = model(spread[:, 9:], cache, attention_mask=mask)[:, 4:]
    torch.testing.assert_close(found, model(tokens)[:, 9:], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("scan")
def test_gradients_pass_by_padding() -> None:
    model = make_model(ssd_skip=True, ssd_conv_width=4)
    row = make_tokens(1, 19)
    tokens, mask = pad_left([make_tokens(1, 23, seed=1)[0], row[0]], filler=0)

    def gradients(ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        model.zero_grad()
        with torch.enable_grad():
            model(ids, attention_mask=mask)[-1, -19:].square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients(row, None)
    for name, grad in gradients(tokens, mask).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-3, msg=name)


def test_masks_that_do_not_fit_are_refused() -> None:
    model, tokens = make_model(), make_tokens(2, 6)
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0
    cache = Cache(model.config)
    with pytest.raises(ValueError, match=r"has shape \(2, 5\); expected \(2, 6\)"):
        model(tokens, cache, attention_mask=mask[:, 1:])
    with pytest.raises(ValueError, match="exclude each other"):
        model(tokens, position_offset=3, attention_mask=mask)
    model(tokens, cache, attention_mask=mask)
    with pytest.raises(ValueError, match="The cache holds padding"):
        model(tokens[:, :1], cache)
    with pytest.raises(ValueError, match=r"6 tokens in the cache and 1 new"):
        model(tokens[:, :1], cache, attention_mask=mask[:, :1])


def test_unified_rope_is_relative() -> None:
    tokens = make_tokens(1, 20)
    model = make_model()
    moved = model(tokens, position_offset=50)
    torch.testing.assert_close(moved, model(tokens), rtol=1e-4, atol=1e-4)
    cache = Cache(model.config)  # but a gap between prompt and continuation is seen
    model(tokens[:, :10], cache)
    gap = model(tokens[:, 10:], cache, position_offset=15)
    assert (gap - model(tokens)[:, 10:]).abs().max() > 1e-2


def test_bfloat16_model_is_near_float32() -> None:
    tokens = make_tokens(2, 33)
    model = make_model()
    expected = model(tokens)
    logits = model.to(torch.bfloat16)(tokens)
    assert logits.dtype == torch.float32
    assert (logits - expected).square().mean().sqrt() < 0.05 * expected.std()


def test_gradients_reach_every_parameter() -> None:
    model = make_model(ssd_skip=True, ssd_conv_width=4, tie_word_embeddings=False)
    with torch.inference_mode():  # an evaluation before it leaves no trace
        model(make_tokens(2, 19))
    with torch.enable_grad():
        model(make_tokens(2, 19)).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


def test_parameter_names_are_those_of_the_design() -> None:
    mlp = ["feed_forward.down_proj", "feed_forward.gate_proj", "feed_forward.up_proj"]
    both = ["pre_sequence_layernorm", "post_sequence_residual", "pre_state_layernorm"]
    both = [f"{name}.weight" for name in [*mlp, *both, "post_state_residual"]]
    attn = [f"attn.{name}_proj.weight" for name in "qkvo"]
    ssd = [f"ssd.{name}_proj.weight" for name in ("x", "b", "c", "dt", "out")]
    ssd += ["ssd.A_log", "ssd.dt_bias"]
    expected = {"model.word_embed.weight", "model.final_layernorm.weight"}
    for i, mixer in enumerate([ssd, attn, ssd]):
        expected |= {f"model.layers.{i}.{name}" for name in both + mixer}
    assert set(make_model().state_dict()) == expected
    rival = make_model(ssd_skip=True, ssd_conv_width=4, tie_word_embeddings=False)
    extra = {f"model.layers.{i}.ssd.{name}" for i in (0, 2) for name in ("D", "conv.weight")}
    assert set(rival.state_dict()) == expected | extra | {"lm_head.weight"}
    assert rival.state_dict()["model.layers.0.ssd.conv.weight"].shape == (32 + 2 * 16, 1, 4)


# ------------------------------------------------------------------------------------ scan, rope


def scan_inputs(batch: int, length: int, heads: int, groups: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(length)
    return {
        "x": torch.randn(batch, length, heads, 8),
        "dt": torch.nn.functional.softplus(torch.randn(batch, length, heads)),
        "A": -torch.exp(torch.rand(heads) * 2.7),
        "b": torch.randn(batch, length, groups, 12),
        "c": torch.randn(batch, length, groups, 12),
        "state": torch.randn(batch, heads, 8, 12),
    }


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 100])
@pytest.mark.parametrize("scan", ["chunked_scan", "batched_scan"])
def test_scan_in_chunks_equals_single_steps(scan: str, length: int) -> None:
    inputs = scan_inputs(2, length, 4, 2)
    y, last = getattr(single_gpu, scan)(**inputs, chunk=16)
    state, steps = inputs["state"], []
    for t in range(length):
        now = {name: inputs[name][:, t : t + 1] for name in ("x", "dt", "b", "c")}
        step, state = single_gpu.single_step(**now, A=inputs["A"], state=state)
        steps.append(step)
    torch.testing.assert_close(y, torch.cat(steps, dim=1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["grouped", "P8-N12", "skip", "no-rope"])
def test_kernels_scan_equals_own_scan(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert single_gpu.kernels_ssd() is not None  # ours is in this repository
    model, tokens = make_model(**VARIANTS[variant]), make_tokens(2, 50)
    cache = Cache(model.config)
    first, second = model(tokens[:, :23], cache), model(tokens[:, 23:], cache)
    monkeypatch.setattr(single_gpu, "kernels_ssd", lambda: None)
    cache = Cache(model.config)
    torch.testing.assert_close(model(tokens[:, :23], cache), first, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(tokens[:, 23:], cache), second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("package", ["foreign", "absent"])
def test_another_package_called_kernels_is_not_used(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if package == "foreign":
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(name): ...\n")
    for name in [n for n in sys.modules if n == "kernels" or n.startswith("kernels.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "editable" not in str(f)])
    assert single_gpu.kernels_ssd.__wrapped__() is None
    # What the look-up imported belongs to this test alone.
    monkeypatch.delitem(sys.modules, "kernels", raising=False)


SCALINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": YARN,
    "yarn-betas": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.1},
    "llama3": LLAMA3,
    "yarn-mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("dim", [8, 12, 64])
def test_rotary_frequencies_match_oracle_and_transformers(name: str, dim: int) -> None:
    scaling = SCALINGS[name]
    config = TransXSSMConfig(**{**TINY, "head_dim": dim, "rope_scaling": scaling})
    freq, magnitude = single_gpu.rotary_frequencies(config, dim)
    if name != "yarn-mscale":  # the oracle leaves those two keys out
        for k in range(dim // 2):
            expected = rope_frequency(k, dim, json.loads(config.to_json()))
            assert (float(freq[k]), magnitude) == pytest.approx(expected, rel=1e-12)
    if scaling is None:
        return
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import PretrainedConfig

    theirs = PretrainedConfig(
        hidden_size=TINY["hidden_size"],
        num_attention_heads=TINY["num_attention_heads"],
        head_dim=dim,
        rope_theta=TINY["rope_theta"],
        rope_scaling=scaling,
        max_position_embeddings=TINY["max_position_embeddings"],
    )
    init = rope_utils.ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
    expected_freq, expected_magnitude = init(theirs, "cpu")
    torch.testing.assert_close(freq.float(), expected_freq, rtol=1e-5, atol=0)
    assert magnitude == pytest.approx(expected_magnitude)


# ------------------------------------------------------------------------------------ the oracle


def test_oracle_packs_documents_without_leaking() -> None:
    model = make_model(ssd_conv_width=4)
    config, tensors = json.loads(model.config.to_json()), model.state_dict()
    tokens = make_tokens(1, 14)[0].tolist()
    packed = model_logits(tensors, config, tokens, [5, 9])
    alone = model_logits(tensors, config, tokens[5:])
    assert np.array_equal(packed[5:], alone)
    assert np.abs(model_logits(tensors, config, tokens)[5:] - alone).max() > 1e-2
