"""An exported model against its checkpoint: every tensor bit for bit, every layer by its output.

The checkpoint's weights run through the training code (parallel.model, one process, CPU, float32)
on real text: as they are, and, when the export rounds them, rounded as well, so that an error of
the export does not hide behind rounding. The exported model then gets, layer by layer, the very
hidden states that entered the training code's layer, so that an error shows in the layer it is in;
and then the tokens alone, end to end. One of the two models is in memory at a time, in float32,
besides the hidden states between the layers.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.export import stored_dtype
from checkpoints_tools.model_folder import load_model
from checkpoints_tools.safetensors_files import SafetensorsFolder
from checkpoints_tools.single_gpu import ModelError, TransXSSM
from checkpoints_tools.source import EXPORT_DTYPES, Source, open_source

# Largest relative difference of an output from what the training code computes with the same
# weights: the two implementations round in another order, which gives about 1e-6.
SAME_WEIGHTS = 1e-5
# And of an output of rounded weights from that of the checkpoint's float32 ones. Rounding moves a
# weight by up to 2^-8 of it in bf16 and 2^-11 in fp16, and a layer's output by half as much in
# typical models. Sharp attention and long decays pass on more; at eight times as much the dtype no
# longer serves the model.
BOUNDS = {"fp32": SAME_WEIGHTS, "bf16": 8 * 2**-8, "fp16": 8 * 2**-11}


@dataclass(frozen=True)
class Difference:
    """The worst relative difference of a token's vector, and how large it may be.

    weights: those of the training code, "float32" as in the checkpoint, or "rounded" as exported.
    """

    what: str
    weights: str
    worst: float
    bound: float

    @property
    def within(self) -> bool:
        """False for NaN too."""
        return self.worst <= self.bound


@dataclass(frozen=True)
class Trace:
    """What the training code computed: hidden states [L, hidden] before every layer and after the
    last, normalised ones, and logits [L, vocab]; float32."""

    hidden: list[Tensor]
    final: Tensor
    logits: Tensor


def compare_export(step_dir: Path, model_dir: Path, ids: Tensor, dtype: str) -> list[Difference]:
    """Differences layer by layer and end to end; ids int64 [1, L], one document.

    Raises CheckpointError when an exported tensor is not the checkpoint's in `dtype`, bit for bit.
    Initialises (and leaves) a process group of one: not for a process that trains.
    """
    source = open_source(step_dir, checksums=False)
    compare_tensors(source, model_dir, dtype)
    traces = {"float32": training_trace(source, ids, "fp32")}
    if dtype != "fp32":
        traces["rounded"] = training_trace(source, ids, dtype)
    try:
        model = load_model(model_dir)
    except ModelError as error:
        raise CheckpointError(str(error)) from error
    found = []
    for weights, trace in traces.items():
        bound = SAME_WEIGHTS if weights == "rounded" else BOUNDS[dtype]
        found += compare_outputs(model, ids, trace, weights, bound)
    return found


def refuse_excess(differences: list[Difference], model_dir: Path) -> None:
    """Raise CheckpointError naming what differs by more than its bound."""
    if beyond := [d for d in differences if not d.within]:
        found = "; ".join(f"{d.what} by {d.worst:.2e} (bound {d.bound:.2e})" for d in beyond[:4])
        more = f" and {len(beyond) - 4} more" if len(beyond) > 4 else ""
        raise CheckpointError(
            f"{model_dir} does not compute what the checkpoint does: {found}{more}; the export is "
            "not kept, please report this"
        )


# -- tensors ---------------------------------------------------------------------------------------


def compare_tensors(source: Source, model_dir: Path, dtype: str) -> None:
    """Raise CheckpointError unless the folder's tensors are the checkpoint's in `dtype`, bit for
    bit, no more and no fewer."""
    exported = SafetensorsFolder(model_dir)
    if names := sorted(exported.tensors.keys() ^ source.shapes.keys()):
        raise CheckpointError(
            f"{model_dir}: {', '.join(names[:4])}: in the export or the model alone"
        )
    for name, shape in source.shapes.items():
        target = stored_dtype(name, EXPORT_DTYPES[dtype])
        found = exported.tensors[name]
        if (found.shape, found.dtype) != (shape, target):
            raise CheckpointError(
                f"{model_dir}: {name} is {found.dtype} {list(found.shape)}, not {target} "
                f"{list(shape)}"
            )
        for rows, block in exported.blocks(name):
            expected = source.stored.rows(f"weight.{name}", rows).to(target)
            same = block.view(torch.uint8) == expected.view(torch.uint8)
            if not same.all():
                row = (
                    rows.start + int((~same).flatten(1).any(1).nonzero()[0])
                    if same.dim() > 1
                    else 0
                )
                raise CheckpointError(
                    f"{model_dir}: {name} is not that of {source.step_dir}, first in row {row}"
                )


# -- outputs ---------------------------------------------------------------------------------------


@torch.no_grad()
def training_trace(source: Source, ids: Tensor, dtype: str) -> Trace:
    """Run ids [1, L] through the training code in float32, with weights rounded to `dtype`."""
    stage = _training_stage(source, ids.shape[1], EXPORT_DTYPES[dtype])
    hidden: list[Tensor] = []
    final: list[Tensor] = []

    def before(_: nn.Module, inputs: Any) -> None:
        hidden.append(inputs[0].squeeze(1).clone())

    def after_last(_: nn.Module, inputs: Any, output: Tensor) -> None:
        hidden.append(inputs[0].squeeze(1).clone())
        final.append(output.squeeze(1).clone())

    for layer in stage.model.layers.values():
        layer.register_forward_pre_hook(before)
    stage.model.final_layernorm.register_forward_hook(after_last)
    positions = torch.arange(ids.shape[1])[None]
    cu_seqlens = torch.tensor([0, ids.shape[1]], dtype=torch.int32)
    logits = stage.logits(ids, positions, cu_seqlens)[:, : stage.model_config.vocab_size]
    return Trace(hidden, final[0], logits.clone())


def _training_stage(source: Source, seq_len: int, rounded: torch.dtype) -> Any:
    """The whole model as one pipeline stage on the CPU, float32, with rounded weights."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks for a GPU
    from parallel.build import megatron_config
    from parallel.compat import prepare_host
    from parallel.config import ModelConfig, ParallelConfig
    from parallel.groups import init_groups
    from parallel.model import PipelineStage
    from parallel.params import describe_parameters

    if (device := prepare_host()).type != "cpu":
        raise CheckpointError(
            "the comparison runs on the CPU, and a GPU is in use by this process; set "
            "CUDA_VISIBLE_DEVICES to nothing, or export with --no-verify"
        )
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = ModelConfig(**source.manifest["config"]["model"])
    except ValidationError as error:
        raise CheckpointError(
            f"{source.step_dir}: the training code of this version does not know its model "
            f"({error.errors()[0]['loc']}: {error.errors()[0]['msg']}); export with the version "
            "that wrote it, or with --no-verify"
        ) from error
    alone = ParallelConfig()
    init_groups(alone)
    stage = PipelineStage(
        model,
        megatron_config(model, alone, torch.float32, deterministic=False),
        range(model.num_layers),
        first=True,
        last=True,
        recompute=alone.recompute_of,
        seq_len=seq_len,
        device=device,
    )
    infos = describe_parameters(stage, model, tensor_rank=0, tensor_size=1)
    parameters = dict(stage.named_parameters())
    if different := sorted(parameters.keys() ^ source.shapes.keys()):
        raise CheckpointError(f"{source.step_dir}: the training code differs in {different[:4]}")
    for name, parameter in parameters.items():
        if infos[name].global_shape != source.shapes[name]:
            raise CheckpointError(
                f"{source.step_dir}: {name} is {source.shapes[name]}, the training code has "
                f"{infos[name].global_shape}"
            )
        for rows, block in source.stored.blocks(f"weight.{name}"):  # padding rows stay as they are
            parameter[rows.start : rows.stop] = block.to(stored_dtype(name, rounded))
    return stage.eval()


@torch.no_grad()
def compare_outputs(
    model: TransXSSM, ids: Tensor, trace: Trace, weights: str, bound: float
) -> list[Difference]:
    """The exported model, in float32, against what the training code computed with `weights`."""
    layers = list(model.model.layers)
    outputs = _outputs_for(layers, trace.hidden, lambda: model(ids))
    worst = {"embedding": worst_difference(model.model.word_embed(ids)[0], trace.hidden[0])}
    for number, output in enumerate(outputs):
        kind = "attention" if model.config.is_attention(number) else "ssd"
        before, expected = trace.hidden[number : number + 2]
        # a layer adds little to what passes by it, and is measured by that little; with other
        # weights, what passes by differs as well
        unit = expected - before if bound == SAME_WEIGHTS else expected
        worst[f"layer {number} ({kind})"] = worst_difference(output, expected, unit)
    normalised = model.model.final_layernorm(trace.hidden[-1])
    worst["final norm"] = worst_difference(normalised, trace.final)
    worst["head"] = worst_difference(model.logits(trace.final), trace.logits)
    found = [Difference(what, weights, value, bound) for what, value in worst.items()]
    logits = model(ids)[0]
    deep = bound * max(1.0, amplification(model, ids, logits, bound))
    if bound != SAME_WEIGHTS:  # what rounding does to the layers adds up as independent errors do
        deep *= math.sqrt(len(trace.hidden))
    whole = worst_difference(logits, trace.logits)
    return [*found, Difference("logits, end to end", weights, whole, deep)]


def amplification(model: TransXSSM, ids: Tensor, logits: Tensor, size: float) -> float:
    """How many times larger a relative disturbance of the embeddings by `size` is in the logits.

    About 1 in trained models; some deep ones make more of any error, whoever computes them.
    """
    noise = torch.Generator().manual_seed(0)

    def disturbed(_: nn.Module, arguments: Any) -> Any:
        h = arguments[0]
        by = torch.randn(h.shape, generator=noise)
        by *= size * h.norm(dim=-1, keepdim=True) / by.norm(dim=-1, keepdim=True)
        return h + by, *arguments[1:]

    handle = model.model.layers[0].register_forward_pre_hook(disturbed)
    try:
        return worst_difference(model(ids)[0], logits) / size
    finally:
        handle.remove()


def _outputs_for(
    layers: list[nn.Module], inputs: list[Tensor], run: Callable[[], object]
) -> list[Tensor]:
    """What each layer makes of its own one of `inputs` [L, hidden] while `run` runs the model."""
    outputs: list[Tensor] = []

    def given(number: int) -> Callable[[nn.Module, Any], Any]:
        return lambda _, arguments: (inputs[number][None], *arguments[1:])

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        outputs.append(output[0])

    handles = [layer.register_forward_pre_hook(given(i)) for i, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(keep) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def worst_difference(found: Tensor, expected: Tensor, unit: Tensor | None = None) -> float:
    """Largest |found - expected| / |unit| of a token, in the Euclidean norm of its vector.

    All [L, n]. unit: [expected]; counts as at least a tenth of `expected`, which is rounded to
    float32 in any case, and as at least the median token's, for what cancels to nearly nothing in
    one of them. NaN where something is not finite.
    """
    found, expected = found.double(), expected.double()
    size = (expected if unit is None else unit).double().norm(dim=-1)
    size = torch.maximum(size, expected.norm(dim=-1) * 0.1)
    size = torch.maximum(size, size.median()).clamp(min=1e-30)
    ratio = (found - expected).norm(dim=-1) / size
    return float(ratio.max()) if bool(ratio.isfinite().all()) else math.nan
