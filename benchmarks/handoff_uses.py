"""Ways of calling an export, one row each; run by benchmarks.handoff.

    python handoff_uses.py EXPORT RESULTS [ROW ...]

Every row compares with the plain call, `model(input_ids)` of `from_pretrained`: logits, and
gradients where it trains. The last row fails if anything of this project was imported.
"""

import copy
import sys
import tempfile
from functools import partial
from typing import Any

import torch
from handoff_export import PROJECT, Export, Row, difference, gradients, refused, run, worst
from handoff_export import row as row_of
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig

BOUND = 1e-5  # of the largest difference, relative to the largest value
ROWS: list[Row] = []
row = partial(row_of, ROWS)


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


@row("21", "torch.compile(fullgraph=True), forward and backward")
def compiled(export: Export) -> float:
    model = export.load().train()
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    whole(export.ids, labels=export.ids).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        found = difference(whole(export.ids, attention_mask=export.mask).logits, export.padded)
        found = max(found, difference(whole(export.ids).logits, export.logits))
    return max(found, worst(grads, export.grads))


@row("21", "generate(cache_implementation='static'), compiled")
def static_cache(export: Export) -> float:
    compiling = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiling._compile_all_devices = True  # not on GPUs alone
    given: dict[str, Any] = {"attention_mask": export.mask, "cache_implementation": "static"}
    torch._dynamo.reset()
    counters.clear()
    for length in (23, 17, 23):
        inputs = {"inputs": export.ids[:, -length:], "attention_mask": export.mask[:, -length:]}
        expected = export.generated(export.model, **inputs)
        tokens = export.generated(export.model, **given | inputs, compile_config=compiling)
        assert torch.equal(tokens, expected), f"other tokens after a prompt of {length}"
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 1, f"{graphs} graphs"
    for arguments in ({"num_beams": 3}, {"prefill_chunk_size": 5}):
        expected = export.generated(
            export.model, inputs=export.ids, attention_mask=export.mask, **arguments
        )
        tokens = export.generated(export.model, inputs=export.ids, **given, **arguments)
        assert torch.equal(tokens, expected), f"other tokens with {arguments}"
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


if __name__ == "__main__":
    sys.exit(run(ROWS, BOUND, sys.argv[1:]))
