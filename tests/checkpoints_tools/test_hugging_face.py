"""The Hugging Face side of an export, against the project's own loading and generation."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from checkpoints_tools import hugging_face
from checkpoints_tools.hugging_face import modeling_source, write_hugging_face_files
from checkpoints_tools.model_folder import load_model
from checkpoints_tools.single_gpu import ModelError, TransXSSM
from pretrain.generate import generate, load_tokenizer
from tests.checkpoints_tools.tiny_models import VARIANTS, make_model, pad_left

pytest.importorskip("transformers")

from checkpoints_tools.hugging_face_model import (
    GenerationCache,
    TransXSSMForCausalLM,
    TransXSSMPretrainedConfig,
)

ROOT = Path(__file__).parents[2]
PROJECT = ["megatron", "deepspeed", "checkpoints_tools", "parallel", "pretrain", "data_pipeline"]
PROJECT += ["benchmarks", "slurm", "tests"]
VOCAB = 2 + 256
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
NEW_TOKENS = 12


def tokenizer_file(folder: Path) -> Path:
    """tokenizer.json: end of text, padding, then every byte."""
    special = ["<|endoftext|>", "<|padding|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "original-tokenizer.json"
    tokenizer.save(str(file))
    return file


def export(folder: Path, **changes: Any) -> TransXSSM:
    """An exported folder of a tiny model, which is returned."""
    model = make_model(**{"vocab_size": VOCAB, **SPECIAL, **changes})
    file = tokenizer_file(folder)
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_hugging_face_files(folder, model.config, file)
    file.unlink()
    return model


def prompt(length: int, seed: int) -> list[int]:
    rng = torch.Generator().manual_seed(seed)
    return [int(t) for t in torch.randint(2, VOCAB, (length,), generator=rng)]


PROMPTS = [prompt(17, 1), prompt(1, 2), prompt(70, 3)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TransXSSM]:
    folder = tmp_path_factory.mktemp("exported")
    return folder, export(folder, ssd_conv_width=4, ssd_skip=True)


def load(folder: Path, **arguments: Any) -> Any:
    return TransXSSMForCausalLM.from_pretrained(folder, **arguments)


def wrap(model: TransXSSM) -> Any:
    """The same weights under the interface of transformers."""
    wrapped = TransXSSMForCausalLM(TransXSSMPretrainedConfig(**vars(model.config)))
    weights = dict(model.state_dict())
    if wrapped.lm_head is not None:  # tied heads are modules as well
        weights.setdefault("lm_head.weight", weights["model.word_embed.weight"])
    wrapped.load_state_dict(weights)
    return wrapped.eval()


# ------------------------------------------------------------------------------------ the folder


@pytest.mark.parametrize("kernels", [False, True], ids=["torch-alone", "with-kernels"])
def test_folders_load_without_the_project(kernels: bool, tmp_path: Path) -> None:
    names = ["rival", "untied"] if kernels else list(VARIANTS)
    exports = {name: export(tmp_path / name, **VARIANTS[name]) for name in names}
    jobs = [
        {"folder": str(tmp_path / name), "prompts": PROMPTS, "new_tokens": NEW_TOKENS}
        for name in names
    ]
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("load_export.py")
    paths = [str(ROOT)] if kernels else []
    paths += [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-P", str(script), json.dumps(jobs), ",".join(PROJECT)],
        cwd=tmp_path / "empty",
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for trouble in ("newly initialized", "not used when", "UNEXPECTED", "MISSING", "Warning"):
        assert trouble not in done.stderr, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["imported"] == []
    assert report["kernels"] == kernels
    for (name, model), found in zip(exports.items(), report["folders"], strict=True):
        expected = [generate(model, p, NEW_TOKENS, eos_token_id=0)[0] for p in PROMPTS]
        assert found["tokens"] == expected, name
        assert found["saved_tokens"] == expected, name
        assert found["saved_is_equal"], name
        assert found["module"].startswith("transformers_modules"), name
        assert found["config"] == "TransXSSMPretrainedConfig"
        assert set(found["loading"].values()) == {0}, found["loading"]
        wide = [n for n in model.state_dict() if n.endswith(("A_log", "dt_bias", ".D"))]
        assert found["float32"] == sorted(wide), name
        saved = load_model(tmp_path / name / "saved")  # ours reads what transformers saved
        assert saved.config == model.config
        assert generate(saved, PROMPTS[0], NEW_TOKENS, eos_token_id=0)[0] == expected[0]
        text = "Some text <|endoftext|> ünd more"
        ours = load_tokenizer(tmp_path / name).encode(text, add_special_tokens=False).ids
        assert found["text_ids"] == ours
        assert found["decoded"] == text
        assert found["special"] == [0, 1, model.config.max_position_embeddings]
        assert set(found["batch"]) == {"input_ids", "attention_mask"}
        assert found["batch"]["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
        assert found["batch"]["input_ids"][0][:2] == [1, 1]


def test_our_loader_reads_the_same_folder(exported: tuple[Path, TransXSSM]) -> None:
    folder, model = exported
    loaded = load_model(folder)
    assert loaded.config == model.config
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))
        assert torch.equal(load(folder)(ids).logits, model(ids))


def test_modelling_file_says_where_it_is_from_and_is_clean(tmp_path: Path) -> None:
    source = modeling_source()
    assert source.startswith("# Generated by `transxssm checkpoint export`, transxssm ")
    assert "checkpoints_tools import" not in source
    file = tmp_path / "modeling_transxssm.py"
    file.write_text(source)
    for command in (["check"], ["format", "--check"]):
        config = ["--config", str(ROOT / "pyproject.toml")]
        ruff = [sys.executable, "-m", "ruff", *command, *config, str(file)]
        done = subprocess.run(ruff, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_tokenizer_that_adds_tokens_loses_only_that(tmp_path: Path) -> None:
    file = tokenizer_file(tmp_path)
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.save(str(file))
    config = make_model(vocab_size=VOCAB, **SPECIAL).config
    hugging_face.write_tokenizer(tmp_path, config, file)
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    original = json.loads(file.read_text())
    changed = {name for name in original if original[name] != written[name]}
    assert changed == {"post_processor", "truncation"}
    assert len(Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("abcdef").ids) == 6


def test_tokenizers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config = make_model(vocab_size=VOCAB + 1, eos_token_id=VOCAB).config
    with pytest.raises(ModelError, match=f"has no token {VOCAB}, which is the model's eos_token"):
        write_hugging_face_files(tmp_path, config, tokenizer_file(tmp_path))
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ModelError, match="is not a Hugging Face tokenizer"):
        write_hugging_face_files(tmp_path, config, tmp_path / "broken.json")


# ------------------------------------------------------------------------------------ generation


@pytest.mark.parametrize("variant", ["grouped", "rival", "yarn", "no-attention", "attention-alone"])
def test_generation_agrees_however_it_is_run(variant: str) -> None:
    model = make_model(vocab_size=VOCAB, **{**SPECIAL, **VARIANTS[variant]})
    wrapped = wrap(model)
    rows = [torch.tensor(p) for p in PROMPTS]
    ids, mask = pad_left(rows, filler=1)

    def run(**arguments: Any) -> list[list[int]]:
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 1}
        found = wrapped.generate(ids, attention_mask=mask, **{**settings, **arguments})
        return [[int(t) for t in row[ids.shape[1] :] if t != 1] for row in found]

    expected = [generate(model, p, NEW_TOKENS, eos_token_id=0)[0] for p in PROMPTS]
    assert run() == expected
    assert run(use_cache=False) == expected
    beams = run(num_beams=3, num_return_sequences=2)
    assert beams == run(num_beams=3, num_return_sequences=2, use_cache=False)
    assert beams[::2] != expected
    for row, best in zip(PROMPTS, beams[::2], strict=True):
        alone = wrapped.generate(torch.tensor([row]), max_new_tokens=NEW_TOKENS, num_beams=3)
        assert [int(t) for t in alone[0, len(row) :] if t != 1] == best
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        settings = {"do_sample": True, "top_k": 0, "num_return_sequences": 2}
        samples.append(run(use_cache=use_cache, **settings))
    assert samples[0] == samples[1]
    assert samples[0][::2] != expected


def test_generation_goes_on_from_a_cache(exported: tuple[Path, TransXSSM]) -> None:
    folder, model = exported
    wrapped = load(folder)
    first = wrapped.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=5, return_dict_in_generate=True
    )
    memory = first.past_key_values
    assert isinstance(memory, GenerationCache)
    longer = torch.cat([first.sequences, torch.tensor([PROMPTS[1]])], dim=1)
    key = "cache" if "cache" in first else "past_key_values"
    again = wrapped.generate(longer, max_new_tokens=5, **{key: memory})
    expected = generate(model, longer[0].tolist(), 5, eos_token_id=0)[0]
    assert again[0, longer.shape[1] :].tolist() == expected
    with pytest.raises(NotImplementedError, match="cannot be cut"):
        memory.crop(3)
    with pytest.raises(ValueError, match="stateful"):
        wrapped.generate(longer, max_new_tokens=5, assistant_model=wrapped)


def test_cache_rows_are_repeated_and_chosen(exported: tuple[Path, TransXSSM]) -> None:
    wrapped = load(exported[0])
    ids = torch.tensor([prompt(9, 4), prompt(9, 5)])
    order = torch.tensor([1, 1, 0])
    with torch.no_grad():
        memory = wrapped(ids).past_key_values
        memory.batch_repeat_interleave(2)
        memory.batch_select_indices(torch.tensor([0, 2]))
        memory.reorder_cache(order)
        found = wrapped(ids[order, :1], past_key_values=memory).logits
        whole = wrapped(torch.cat([ids, ids[:, :1]], dim=1)[order]).logits[:, -1:]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------ training


def without_loss_at_padding(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Labels without padding and without the first token after it, which nothing predicts."""
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return ids.masked_fill(mask * before == 0, -100)


def test_loss_is_that_of_the_next_token(exported: tuple[Path, TransXSSM]) -> None:
    wrapped = load(exported[0])
    ids, mask = pad_left([torch.tensor(p) for p in PROMPTS[::2]], filler=1)
    labels = without_loss_at_padding(ids, mask)
    with torch.no_grad():
        output = wrapped(ids, attention_mask=mask, labels=labels)
    losses, count = 0.0, 0
    for row in PROMPTS[::2]:
        with torch.no_grad():
            logp = exported[1](torch.tensor([row]))[0, :-1].log_softmax(-1)
        losses -= float(logp.gather(1, torch.tensor(row)[1:, None]).sum())
        count += len(row) - 1
    assert float(output.loss) == pytest.approx(losses / count, rel=1e-4)
    last = wrapped(ids, attention_mask=mask, logits_to_keep=1).logits
    torch.testing.assert_close(last, output.logits[:, -1:])
    chosen = wrapped(ids, attention_mask=mask, logits_to_keep=torch.tensor([3, 5])).logits
    torch.testing.assert_close(chosen, output.logits[:, [3, 5]])
    values = wrapped(ids, labels=ids, return_dict=False)
    assert values[0].shape == ()
    assert values[1].shape == (*ids.shape, VOCAB)


def test_padding_on_the_right_trains_the_same(exported: tuple[Path, TransXSSM]) -> None:
    wrapped = load(exported[0]).train()
    left, mask = pad_left([torch.tensor(p) for p in PROMPTS[::2]], filler=1)
    right, mask_right = (torch.stack([left[0].roll(-53), left[1]]), mask.clone())
    mask_right[0] = mask[0].roll(-53)
    losses = [
        wrapped(ids, attention_mask=m, labels=without_loss_at_padding(ids, m)).loss
        for ids, m in ((left, mask), (right, mask_right))
    ]
    torch.testing.assert_close(losses[0], losses[1])


def test_fine_tuning_lowers_the_loss(tmp_path: Path) -> None:
    export(tmp_path, ssd_skip=True, ssd_conv_width=4, tie_word_embeddings=False)
    wrapped = load(tmp_path).train()
    ids = torch.tensor([PROMPTS[0]])
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        output = wrapped(ids, labels=ids)
        assert output.past_key_values is None
        optimizer.zero_grad()
        output.loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in wrapped.parameters())
        optimizer.step()
        losses.append(float(output.loss.detach()))
    assert losses[-1] < losses[0] - 1


def test_new_models_are_initialised_as_ours() -> None:
    config = make_model(ssd_skip=True).config
    torch.manual_seed(0)
    wrapped = TransXSSMForCausalLM(TransXSSMPretrainedConfig(**vars(config)))
    ssd = wrapped.model.layers[0].ssd
    assert 0 < ssd.A_log.min() < ssd.A_log.max() < 2.78
    assert ssd.dt_bias.max() < -2
    assert torch.equal(ssd.D, torch.ones(4))
    assert float(ssd.out_proj.weight.detach().std()) == pytest.approx(0.02 / 6**0.5, rel=0.2)


def test_what_is_not_supported_is_refused(exported: tuple[Path, TransXSSM]) -> None:
    wrapped = load(exported[0])
    ids = torch.tensor([PROMPTS[0]])
    for arguments in ({"output_attentions": True}, {"cu_seq_lens_q": torch.tensor([0, 9, 17])}):
        message = re.escape(f"{next(iter(arguments))} is not supported by TransXSSM")
        with pytest.raises(ValueError, match=message):
            wrapped(ids, **arguments)
    with pytest.raises(ValueError, match="exactly one of them"):
        wrapped(ids, inputs_embeds=torch.zeros(1, 17, 24))
    with pytest.raises(ValueError, match="exactly one of them"):
        wrapped()
    with pytest.raises(ValueError, match="The cache is a dict, which holds no SSD states"):
        wrapped(ids, past_key_values={})
    with pytest.raises(ValueError, match="no token beyond the 0 in the cache"):
        wrapped(ids[:, :0])
    with pytest.raises(ModelError, match="lacks vocab_size, hidden_size"):
        TransXSSMForCausalLM(TransXSSMPretrainedConfig())
    with pytest.raises(ModelError, match="head_dim=7 is not"):
        TransXSSMForCausalLM(
            TransXSSMPretrainedConfig(**{**vars(exported[1].config), "head_dim": 7})
        )
