"""The section of a model card on use: loading, generating, fine-tuning, sharding."""

from checkpoints_tools.single_gpu import TransXSSMConfig

USAGE = """## Use

The folder brings its own modelling file, `modeling_transxssm.py`, which needs torch and
transformers (4.57 or 5) alone; `trust_remote_code=True` lets transformers run it.

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # of this file
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.{dtype})
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
batch = tokenizer(["Once upon a time"], return_tensors="pt")
tokens = model.generate(**batch, max_new_tokens=50, do_sample=False)
print(tokenizer.decode(tokens[0]))
```

It was trained on sequences of up to {length:,} tokens. A row of a batch is one sequence, padded at
any side with `attention_mask` 0; positions follow from the mask. Documents packed into one row
would see each other, so `position_ids` that begin again in a row are refused. `output_attentions`
is refused, too. The cache holds SSD states: it cannot be cropped, so assisted decoding is not
supported.

`torch.compile(model, fullgraph=True)` traces the model without a graph break, forward and backward.
`generate(..., cache_implementation="static")` allocates keys and values once for the whole length
and writes SSD states in place; on a GPU transformers then compiles one step for all tokens. To
compile such a step yourself, give `attention_mask` for the whole length of the cache, with 1 for
tokens to come.

## Fine-tuning

- `Trainer`, `gradient_checkpointing`, `inputs_embeds`, `resize_token_embeddings` and `device_map`
  with offloading work as for other models. Labels are the input ids, not shifted, with -100 where
  no loss is wanted.
- PEFT: `target_modules="all-linear"`, or some of `q_proj`, `k_proj`, `v_proj`, `o_proj`
  (attention), `x_proj`, `b_proj`, `c_proj`, `dt_proj`, `out_proj` (SSD), `gate_proj`, `up_proj`,
  `down_proj` and `lm_head`.{tied}
- Load the model in float32 and train with `bf16=True` (autocast), which keeps scans in float32.
  `model.to(torch.bfloat16)` rounds `A_log`, `dt_bias` and `D`, on which the decay of states
  depends, and the model warns of it; `from_pretrained(..., dtype=torch.bfloat16)` keeps them
  float32.
- FSDP with one mixed precision for the whole model, such as `Trainer` and accelerate set up from
  `bf16=True`, rounds them likewise, and FSDP1 refuses a model that is loaded in bfloat16. Wrap the
  model as follows instead, loaded in float32 or bfloat16, once the process group is there.

### FSDP2 in bf16

```python
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for layer in model.model.layers:
    if hasattr(layer, "ssd"):
        fully_shard(list(layer.ssd.children()), mp_policy=bf16)
        fully_shard(layer.ssd)  # what is left, A_log, dt_bias and D, stays float32
    fully_shard(layer, mp_policy=bf16)
fully_shard(model, mp_policy=bf16)
```

### FSDP1 in bf16

`device` is this rank's, such as `torch.device("cuda", local_rank)`.

```python
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import CustomPolicy

bf16 = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
layers = list(model.model.layers)
mixers = [layer.ssd for layer in layers if hasattr(layer, "ssd")]
units = {{*layers, *(part for mixer in mixers for part in mixer.children())}}


def policy(module):
    if module in mixers:  # what is left of them, A_log, dt_bias and D, stays float32
        return {{"mixed_precision": None}}
    return module in units


model = FullyShardedDataParallel(
    model,
    auto_wrap_policy=CustomPolicy(policy),
    mixed_precision=bf16,
    use_orig_params=True,
    device_id=device,
)
```
"""
TIED = """ The head is tied to the embedding: merging a LoRA of `lm_head` would change
  both, so keep it as an adapter or untie them first."""


def usage_section(config: TransXSSMConfig) -> str:
    """The section, as Markdown."""
    return USAGE.format(
        dtype=config.dtype,
        length=config.max_position_embeddings,
        tied=TIED if config.tie_word_embeddings else "",
    )
