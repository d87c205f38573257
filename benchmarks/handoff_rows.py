"""What colleagues do with an export, one row each; run by benchmarks.handoff.

    python handoff_rows.py EXPORT RESULTS [ROW ...]

EXPORT is the folder, RESULTS a file to which a line of JSON is added for every row. The process
has torch, transformers, peft and accelerate, and none of this project: importing it fails, and so
does the last row if something has. Every row compares with the plain call, `model(input_ids)` of
`from_pretrained`: logits, and gradients where it trains.
"""

import copy
import importlib.abc
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

PROJECT = {"benchmarks", "checkpoints_tools", "data_pipeline", "parallel", "pretrain", "slurm"}
PROJECT |= {"tests", "untrusted", "kernels.ssd"}  # transformers looks for a package kernels


class Blocker(importlib.abc.MetaPathFinder):
    """Makes importing the project fail as if it were not installed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if name in PROJECT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocker())

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

BOUND = 1e-5  # of the largest difference, relative to the largest value
ROWS: list[tuple[str, str, Callable[["Export"], float]]] = []


class Export:
    """The folder, and what the plain call makes of it."""

    def __init__(self, folder: Path, *, plain: bool = True) -> None:
        self.folder = folder
        rng = torch.Generator().manual_seed(7)
        self.ids = torch.randint(2, 250, (2, 23), generator=rng)
        if not plain:
            return
        self.model = self.load()
        self.tied = self.model.config.tie_word_embeddings
        self.mask = torch.ones_like(self.ids)
        self.mask[0, :9] = 0  # padded on the left
        with torch.no_grad():
            self.logits = self.model(self.ids).logits
            self.padded = self.model(self.ids, attention_mask=self.mask).logits
        self.grads = gradients(self.load().train(), input_ids=self.ids, labels=self.ids)

    def load(self, **arguments: Any) -> Any:
        arguments = {"dtype": torch.float32, **arguments}
        return AutoModelForCausalLM.from_pretrained(
            self.folder, trust_remote_code=True, **arguments
        ).eval()

    def generated(self, model: Any, **arguments: Any) -> Tensor:
        """Six tokens after each row of the prompts, greedily."""
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        tokens: Tensor = model.generate(**settings, **arguments)
        return tokens


def row(item: str, name: str) -> Callable[[Callable[[Export], float]], Callable[[Export], float]]:
    """Register a row: a function of the export that returns its largest relative difference."""

    def register(function: Callable[[Export], float]) -> Callable[[Export], float]:
        ROWS.append((item, name, function))
        return function

    return register


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest value. Raises AssertionError on shapes."""
    assert found.shape == expected.shape, f"shape {found.shape}, not {expected.shape}"
    assert bool(found.isfinite().all()), "not finite"
    scale = float(expected.abs().max()) or 1.0
    return float((found.double() - expected.double()).abs().max()) / scale


def gradients(model: Any, **arguments: Any) -> dict[str, Tensor]:
    """By parameter, of the loss. Raises AssertionError where a parameter has none."""
    model.zero_grad()
    model(**arguments).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, f"no gradient of {missing[:3]}"
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any. Raises AssertionError when names differ."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:3]
    return max(difference(found[name], expected[name]) for name in expected)


def refused(message: str, call: Callable[[], Any]) -> None:
    """Raise AssertionError unless the call raises ValueError with this message."""
    problem = "not refused"
    try:
        call()
    except ValueError as error:
        problem = str(error)
    assert message in problem, problem


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


# ------------------------------------------------------------------------------------ 26


@row("26", "gradient_checkpointing, reentrant and not")
def checkpointing(export: Export) -> float:
    found = 0.0
    for reentrant in (False, True):
        model = export.load().train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ran: list[int] = []
        layer = model.model.layers[0]
        layer.feed_forward.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        found = max(found, worst(gradients(model, input_ids=export.ids, labels=export.ids),
                                 export.grads))  # fmt: skip
        assert len(ran) == 2, f"a layer ran {len(ran)} times"
        padded = model(export.ids, attention_mask=export.mask, use_cache=True)
        found = max(found, difference(padded.logits.detach(), export.padded))
        model.gradient_checkpointing_disable()
        ran.clear()
        gradients(model, input_ids=export.ids, labels=export.ids)
        assert len(ran) == 1, f"a layer ran {len(ran)} times"
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


@row("26", "inputs_embeds")
def inputs_embeds(export: Export) -> float:
    embed = export.model.get_input_embeddings()
    with torch.no_grad():
        given = embed(export.ids)
        found = difference(export.model(inputs_embeds=given).logits, export.logits)
        padded = export.model(inputs_embeds=given, attention_mask=export.mask).logits
        found = max(found, difference(padded, export.padded))
    model = export.load().train()
    grads = gradients(
        model, inputs_embeds=model.get_input_embeddings()(export.ids), labels=export.ids
    )
    refused("exactly one", lambda: export.model(export.ids, inputs_embeds=given))
    refused("exactly one", lambda: export.model())
    return max(found, worst(grads, export.grads))


@row("26", "generate(inputs_embeds)")
def generate_embeds(export: Export) -> float:
    embed = export.model.get_input_embeddings()
    for beams in (1, 3):
        expected = export.generated(
            export.model, inputs=export.ids, attention_mask=export.mask, num_beams=beams
        )
        given = {"attention_mask": export.mask, "num_beams": beams}
        given["inputs_embeds"] = embed(export.ids).detach()
        alone = export.generated(export.model, **given)
        assert torch.equal(alone, expected[:, export.ids.shape[1] :]), "other tokens"
        both = export.generated(export.model, input_ids=export.ids, **given)
        assert torch.equal(both, expected), "other tokens with input_ids beside"
    return 0.0


@row("26", "output_hidden_states")
def hidden_states(export: Export) -> float:
    model = export.model
    with torch.no_grad():
        output = model(export.ids, output_hidden_states=True)
        states = output.hidden_states
        assert len(states) == model.config.num_hidden_layers + 1, len(states)
        found = difference(output.logits, export.logits)
        found = max(found, difference(states[0], model.get_input_embeddings()(export.ids)))
        found = max(found, difference(model.get_output_embeddings()(states[-1]), export.logits))
        for i in range(1, len(states) - 1):  # what a hook on the layer sees
            seen: list[Tensor] = []
            layer = model.model.layers[i - 1]
            handle = layer.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
            model(export.ids)
            handle.remove()
            found = max(found, difference(states[i], seen[0]))
        values = model(export.ids, output_hidden_states=True, use_cache=False, return_dict=False)
        assert len(values) == 2
        assert len(values[1]) == len(states)
    return found


@row("26", "generate(output_hidden_states, output_logits)")
def generate_states(export: Export) -> float:
    settings = {"return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        output = export.model.generate(
            export.ids, max_new_tokens=4, do_sample=False, output_hidden_states=True, **settings
        )
        whole = export.model(output.sequences).logits[:, export.ids.shape[1] - 1 : -1]
        head = export.model.get_output_embeddings()
        states = torch.cat([head(step[-1][:, -1:]) for step in output.hidden_states], dim=1)
        logits = torch.stack(output.logits, dim=1)
    steps = logits.shape[1]  # fewer when the text has ended
    return max(difference(logits, whole[:, :steps]), difference(states, whole[:, :steps]))


@row("26", "get_output_embeddings()")
def output_embeddings(export: Export) -> float:
    head, embedding = (getattr(export.model, f"get_{n}_embeddings")() for n in ("output", "input"))
    assert (head.weight is embedding.weight) == export.tied
    assert head.weight.shape == (export.model.config.vocab_size, export.model.config.hidden_size)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        export.model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        assert (again.lm_head.weight is again.model.word_embed.weight) == export.tied
        return difference(again(export.ids).logits, export.logits)


@row("26", "resize_token_embeddings()")
def resize(export: Export) -> float:
    size, found = export.model.config.vocab_size, 0.0
    cases = ({"mean_resizing": False}, {"mean_resizing": True},
             {"mean_resizing": False, "pad_to_multiple_of": 64})  # fmt: skip
    for arguments in cases:
        model = export.load()
        new = model.resize_token_embeddings(size + 3, **arguments).weight.shape[0]
        assert model.config.vocab_size == new >= size + 3
        assert (model.lm_head.weight is model.model.word_embed.weight) == export.tied
        fresh = model.get_input_embeddings().weight[size:]
        assert 0 < float(fresh.detach().std()) < 1, "new rows are no embeddings"
        with torch.no_grad():
            logits = model(export.ids).logits
            assert logits.shape[-1] == new
            found = max(found, difference(logits[..., :size], export.logits))
            ids = export.ids.clone()
            ids[:, 5] = size + 1
            expected = model(ids).logits
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
            found = max(found, difference(again.eval()(ids).logits, expected))
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        assert float(model.get_input_embeddings().weight.grad[size + 1].abs().max()) > 0
        with torch.no_grad():
            model.resize_token_embeddings(size, mean_resizing=False)
            found = max(found, difference(model.eval()(export.ids).logits, export.logits))
    return found


@row("26", "generate(prefill_chunk_size)")
def prefill(export: Export) -> float:
    for length in (1, 2, 3, 4, 7, 23):
        ids = export.ids[:, -length:]
        expected = export.generated(export.model, inputs=ids)
        found = export.generated(export.model, inputs=ids, prefill_chunk_size=3)
        assert torch.equal(found, expected), f"other tokens after a prompt of {length}"
    given = {"inputs": export.ids, "attention_mask": export.mask}
    expected = export.generated(export.model, **given)
    for size in (3, 5, 64):
        found = export.generated(export.model, **given, prefill_chunk_size=size)
        assert torch.equal(found, expected), f"other tokens with padding, pieces of {size}"
    return 0.0


@row("26", "position_ids that follow from the mask")
def positions(export: Export) -> float:
    model, length = export.model, export.ids.shape[1]
    plain = torch.arange(length)[None]
    of_mask = export.mask.cumsum(-1) - 1
    with torch.no_grad():
        found = difference(model(export.ids, position_ids=plain).logits, export.logits)
        both = model(export.ids, position_ids=plain.expand(2, -1)).logits
        found = max(found, difference(both, export.logits))
        for filler in (0, 1):  # at padding: transformers 5 and 4
            ids = of_mask.masked_fill(export.mask == 0, filler)
            output = model(export.ids, attention_mask=export.mask, position_ids=ids)
            found = max(found, difference(output.logits, export.padded))
        memory = model(export.ids[:, :20], attention_mask=export.mask[:, :20], use_cache=True)
        key = "cache" if "cache" in memory else "past_key_values"
        rest = model(
            export.ids[:, 20:], attention_mask=export.mask, position_ids=of_mask[:, 20:],
            **{key: memory[key]},
        )  # fmt: skip
        found = max(found, difference(rest.logits, export.padded[:, 20:]))
        wrong = plain.clone()
        wrong[0, 12:] = torch.arange(length - 12)  # two documents in a row
        for ids in (wrong, plain + 1, plain[:, :-1], wrong.expand(2, -1)):
            refused("position_ids", partial(model, export.ids, position_ids=ids))
        refused(
            "position_ids",
            lambda: model(export.ids, attention_mask=export.mask, position_ids=plain),
        )
    given = {"inputs": export.ids, "attention_mask": export.mask}
    expected = export.generated(model, **given)
    filled = of_mask.masked_fill(export.mask == 0, 1)
    for use_cache in (True, False):
        tokens = export.generated(model, **given, position_ids=filled, use_cache=use_cache)
        assert torch.equal(tokens, expected), "generate(position_ids) gives other tokens"
    return found


@row("26", "autocast to bf16: scans stay float32")
def autocast(export: Export) -> float:
    seen: set[torch.dtype] = set()
    model = export.load()
    module: Any = sys.modules[type(model).__module__]
    original = module.chunked_scan

    def watched(*arguments: Any) -> Any:
        y, state = original(*arguments)
        assert not torch.is_autocast_enabled("cpu"), "the scan's products are bf16"
        seen.update((y.dtype, state.dtype))
        return y, state

    module.chunked_scan = watched
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = difference(model(export.ids).logits, export.logits)
    finally:
        module.chunked_scan = original
    assert seen <= {torch.float32}, seen
    assert found < 0.05, f"{found:.3g} from the float32 logits"
    return 0.0


@row("26", "tokenizer, save_pretrained, deepcopy")
def copies(export: Export) -> float:
    tokenizer = AutoTokenizer.from_pretrained(export.folder, trust_remote_code=True)
    assert tokenizer.model_max_length == export.model.config.max_position_embeddings
    batch = tokenizer(["a", "some text"], padding=True, return_tensors="pt")
    again = copy.deepcopy(export.model)
    with torch.no_grad():
        return difference(again(**batch).logits, export.model(**batch).logits)


@row("26", "nothing of the project was imported")
def imports(export: Export) -> float:
    found = sorted(set(sys.modules) & PROJECT)
    assert not found, f"imported {found}"
    return 0.0


def passed(results: str) -> set[str]:
    """Rows that an earlier call has put into the file of results without a problem."""
    path = Path(results)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines]
    return {entry["row"] for entry in entries if not entry["problem"]}


def main(arguments: list[str]) -> int:
    """Run the rows that are named, or all that have not passed yet; 3 when one fails, else 0."""
    folder, results, *names = arguments
    done = passed(results)
    chosen = [r for r in ROWS if (r[1] in names if names else r[1] not in done)]
    if not chosen:
        return 0
    torch.set_num_threads(1)
    export = Export(Path(folder))
    failed = 0
    for item, name, function in chosen:
        begin = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            try:
                found, problem = function(export), ""
                if found > BOUND:
                    problem = f"differs by {found:.2e}"
            except Exception as error:
                found, problem = float("nan"), f"{type(error).__name__}: {error}"
                traceback.print_exc()
        if rounded := [str(w.message) for w in caught if "TransXSSM" in str(w.message)]:
            problem = problem or rounded[0]
        entry = {"item": item, "row": name, "worst": found, "problem": problem}
        entry["seconds"] = time.perf_counter() - begin
        failed += bool(problem)
        with open(results, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
