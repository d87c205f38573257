"""Trainer, offloading and adapters of an export, one row each; run by benchmarks.handoff.

    python handoff_tools.py EXPORT RESULTS [ROW ...]

Every row compares with the plain call, `model(input_ids)` of `from_pretrained`: logits, and
gradients where it trains.
"""

import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from handoff_export import Export, Row, difference, gradients, run, worst
from handoff_export import row as row_of
from torch import Tensor
from transformers import Trainer, TrainingArguments

BOUND = 1e-5  # of the largest difference, relative to the largest value
ROWS: list[Row] = []
row = partial(row_of, ROWS)


# ------------------------------------------------------------------------------------ 24: Trainer


def trainer(model: Any, folder: str, **arguments: Any) -> Trainer:
    settings = {
        "output_dir": folder,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "max_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-3,
    }
    return Trainer(model=model, args=TrainingArguments(**{**settings, **arguments}))


def rows_of(export: Export, count: int = 4) -> list[dict[str, Tensor]]:
    """Samples, without loss at the first token: transformers 4 counts that in a batch's mean."""
    ids = export.ids.repeat(count // 2, 1)
    labels = ids.clone()
    labels[:, 0] = -100
    return [{"input_ids": i, "labels": n} for i, n in zip(ids, labels, strict=True)]


@row("24", "Trainer.evaluate()")
def evaluate(export: Export) -> float:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        loss = trainer(export.load(), folder).evaluate(rows_of(export))["eval_loss"]
        expected = export.model(export.ids, labels=export.ids).loss
    return difference(torch.tensor(loss), expected)


@row("24", "Trainer.predict()")
def predict(export: Export) -> float:
    with tempfile.TemporaryDirectory() as folder:
        found = trainer(export.load(), folder).predict(rows_of(export)).predictions
    return difference(torch.from_numpy(found), export.logits.repeat(2, 1, 1))


@row("24", "Trainer.train(), with and without gradient_checkpointing")
def train(export: Export) -> float:
    states = []
    for again in (False, True):
        model = export.load()
        with tempfile.TemporaryDirectory() as folder:
            made = trainer(model, folder, gradient_checkpointing=again)
            made.train_dataset = rows_of(export)
            made.train()
        states.append({n: p.detach().clone() for n, p in model.named_parameters()})
    changed = [n for n, p in export.model.named_parameters() if not torch.equal(p, states[0][n])]
    assert len(changed) == len(states[0]), "parameters that did not train"
    return worst(states[1], states[0])


# ------------------------------------------------------------------------------------ 25: offload


def offloaded(export: Export, on_disk: Sequence[str], dtype: torch.dtype) -> float:
    """Logits and tokens with these modules on disk, the others on the CPU."""
    plain = export if dtype == torch.float32 else None
    model = export.model if plain else export.load(dtype=dtype)
    names = ["model.word_embed", "model.final_layernorm", "lm_head"]
    names += [f"model.layers.{i}" for i in range(model.config.num_hidden_layers)]
    device_map = {name: "disk" if name in on_disk else "cpu" for name in names}
    if export.tied and "lm_head" not in on_disk:
        del device_map["lm_head"]  # which is where the embedding is
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        away = export.load(device_map=device_map, offload_folder=folder, dtype=dtype)
        found = difference(away(export.ids).logits, model(export.ids).logits)
        tokens = [
            export.generated(m, inputs=export.ids, attention_mask=export.mask)
            for m in (away, model)
        ]
    assert torch.equal(*tokens), "generate() gives other tokens"
    return found


@row("25", "device_map: the head on disk")
def head_on_disk(export: Export) -> float:
    return offloaded(export, ["lm_head"], torch.float32)


@row("25", "device_map: the embedding on disk")
def embedding_on_disk(export: Export) -> float:
    return offloaded(export, ["model.word_embed"], torch.float32)


@row("25", "device_map: head and embedding on disk")
def both_on_disk(export: Export) -> float:
    return offloaded(export, ["model.word_embed", "lm_head"], torch.float32)


@row("25", "device_map: all layers on disk")
def layers_on_disk(export: Export) -> float:
    names = [f"model.layers.{i}" for i in range(export.model.config.num_hidden_layers)]
    return offloaded(export, [*names, "model.final_layernorm"], torch.float32)


@row("25", "device_map: everything on disk, bf16")
def bf16_on_disk(export: Export) -> float:
    names = [f"model.layers.{i}" for i in range(export.model.config.num_hidden_layers)]
    return offloaded(export, [*names, "model.word_embed", "lm_head"], torch.bfloat16)


@row("25", 'device_map="auto" with little memory')
def automatic(export: Export) -> float:
    size = sum(p.nbytes for p in export.model.parameters())
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        away = export.load(
            device_map="auto", max_memory={"cpu": int(size * 0.6)}, offload_folder=folder
        )
        assert "disk" in away.hf_device_map.values(), away.hf_device_map
        return difference(away(export.ids).logits, export.logits)


@row("25", "accelerate.cpu_offload()")
def cpu_offload(export: Export) -> float:
    from accelerate import cpu_offload as offload

    with torch.no_grad():
        away = offload(export.load(), execution_device=torch.device("cpu"))
        return difference(away(export.ids).logits, export.logits)


# ------------------------------------------------------------------------------------ 25: adapters


def adapted(export: Export, **arguments: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*|.*tied.*")
        return get_peft_model(export.load(), LoraConfig(r=4, lora_alpha=8, **arguments))


def trains(export: Export, model: Any) -> float:
    """The plain logits at first; after steps, others and a smaller loss; every adapter moves."""
    with torch.no_grad():
        found = difference(model(export.ids).logits, export.logits)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    model.train()
    losses = []
    for _ in range(4):
        loss = model(input_ids=export.ids, labels=export.ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    still = [name for name, p in trained.items() if torch.equal(p, before[name])]
    assert not still, f"never trains: {still[:3]}"
    assert losses[-1] < losses[0], f"the loss goes from {losses[0]:.4f} to {losses[-1]:.4f}"
    return found


@row("25", "PEFT LoRA on lm_head")
def lora_head(export: Export) -> float:
    model = adapted(export, target_modules=["lm_head"])
    found = trains(export, model)
    layer = model.get_output_embeddings()
    model.eval()
    with torch.no_grad():
        states = model(export.ids, output_hidden_states=True)
        down, up = (getattr(layer, n)["default"].weight for n in ("lora_A", "lora_B"))
        added = (states.hidden_states[-1] @ down.T @ up.T) * layer.scaling["default"]
        head = export.model.get_output_embeddings().weight
        return max(found, difference(states.logits, states.hidden_states[-1] @ head.T + added))


@row("25", "PEFT LoRA on lm_head, its gradients")
def lora_head_gradients(export: Export) -> float:
    model = adapted(export, target_modules=["lm_head"]).train()
    layer = model.get_output_embeddings()
    down, up = (getattr(layer, n)["default"].weight for n in ("lora_A", "lora_B"))
    with torch.no_grad():
        up.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    found = gradients(model, input_ids=export.ids, labels=export.ids)
    with torch.no_grad():
        hidden = export.model(export.ids, output_hidden_states=True).hidden_states[-1]
    a, b = (weight.detach().clone().requires_grad_() for weight in (down, up))
    added = (hidden @ a.T @ b.T) * layer.scaling["default"]
    logits = (export.logits + added)[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), export.ids[:, 1:].flatten()).backward()
    assert len(found) == 2, sorted(found)
    name = next(n for n in found if "lora_A" in n)
    other = next(n for n in found if "lora_B" in n)
    return worst(found, {name: a.grad, other: b.grad})


@row("25", 'PEFT LoRA with target_modules="all-linear"')
def lora_linear(export: Export) -> float:
    model = adapted(export, target_modules="all-linear")
    names = {n.rsplit(".", 1)[-1] for n, _ in model.named_modules()}
    assert "lm_head" in names
    assert type(model.get_output_embeddings()).__name__ == "Linear", "the head is not left out"
    return trains(export, model)


@row("25", "PEFT LoRA on word_embed")
def lora_embedding(export: Export) -> float:
    return trains(export, adapted(export, target_modules=["word_embed"]))


@row("25", "PEFT LoRA with modules_to_save=[lm_head]")
def saved_head(export: Export) -> float:
    model = adapted(export, target_modules=["q_proj", "x_proj"], modules_to_save=["lm_head"])
    return trains(export, model)


@row("25", "PEFT LoRA with modules_to_save=[word_embed]")
def saved_embedding(export: Export) -> float:
    model = adapted(export, target_modules=["o_proj", "out_proj"], modules_to_save=["word_embed"])
    return trains(export, model)


@row("25", "PEFT LoRA: saved, loaded, merged")
def merged(export: Export) -> float:
    from peft import PeftModel

    model = adapted(export, target_modules=["lm_head", "x_proj", "q_proj", "down_proj"])
    trains(export, model)
    model.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the base model has no address
        expected = model(export.ids).logits
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(export.load(), folder).eval()
        found = difference(again(export.ids).logits, expected)
        if not export.tied:  # a merged head would be the embedding, too: PEFT warns of it
            found = max(found, difference(again.merge_and_unload()(export.ids).logits, expected))
    return found


@row("26", "gradient_checkpointing of a LoRA")
def checkpointing_adapter(export: Export) -> float:
    found = []
    for again in (False, True):
        model = adapted(export, target_modules=["x_proj", "q_proj"]).train()
        if again:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": True})
        found.append(gradients(model, input_ids=export.ids, labels=export.ids))
    return worst(found[1], found[0])


if __name__ == "__main__":
    sys.exit(run(ROWS, BOUND, sys.argv[1:]))
