"""An exported model against its checkpoint: every tensor bit for bit, every layer by its output.

The checkpoint's weights run through the training code (parallel.model, one process, CPU, float32)
on real text: as they are, and, when the export rounds them, rounded as well, so that an error of
the export does not hide behind rounding. The exported model then gets, layer by layer, the very
hidden states that entered the training code's layer, so that an error shows in the layer it is in;
beside them it carries its own hidden states from the tokens to the logits, end to end.

Memory does not grow with the number of layers or the vocabulary. The training code runs as a
pipeline of stages of one layer each; a layer, of the training code or of the exported model, is in
memory alone. Of the embedding there are the rows of the tokens, and of the head a block of rows,
which is what a vocabulary of that size would have.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from checkpoints_tools.errors import CheckpointError
from checkpoints_tools.export import stored_dtype
from checkpoints_tools.model_folder import empty_model, read_config
from checkpoints_tools.safetensors_files import SafetensorsFolder
from checkpoints_tools.single_gpu import ModelError
from checkpoints_tools.source import EXPORT_DTYPES, Source, open_source

EMBEDDING, HEAD = "model.word_embed.weight", "lm_head.weight"
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


@torch.no_grad()
def compare_export(step_dir: Path, model_dir: Path, ids: Tensor, dtype: str) -> list[Difference]:
    """Differences layer by layer and end to end; ids int64 [1, L], one document.

    Raises CheckpointError when an exported tensor is not the checkpoint's in `dtype`, bit for bit.
    Initialises (and leaves) a process group of one: not for a process that trains.
    """
    source = open_source(step_dir, checksums=False)
    compare_tensors(source, model_dir, dtype)
    training, exported = TrainingCode(source, ids), ExportedModel(model_dir, ids)
    runs = [Run("float32", torch.float32, BOUNDS[dtype])]
    if dtype != "fp32":
        runs.append(Run("rounded", EXPORT_DTYPES[dtype], SAME_WEIGHTS))
    own = _compare_embedding(training, exported, runs)
    for number in range(exported.config.num_hidden_layers):
        own = _compare_layer(training, exported, runs, number, own)
    _compare_head(training, exported, runs, own)
    training.refuse_unread()
    return [difference for run in runs for difference in run.found]


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


@dataclass
class Run:
    """The training code with the checkpoint's weights, float32 or rounded, as far as it has come.

    hidden [L, hidden]: of the training code; disturbed [L, hidden]: of the exported model, after a
    relative disturbance of its embeddings by `bound`. Both float32.
    """

    weights: str
    rounded: torch.dtype
    bound: float
    found: list[Difference] = field(default_factory=list)
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    disturbed: Tensor = field(default_factory=lambda: torch.empty(0))

    def note(self, what: str, worst: float, bound: float | None = None) -> None:
        """One more line of the table."""
        self.found.append(
            Difference(what, self.weights, worst, self.bound if bound is None else bound)
        )


class TrainingCode:
    """The checkpoint's model in the training code, a stage at a time: float32, on the CPU."""

    def __init__(self, source: Source, ids: Tensor) -> None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks for a GPU
        from parallel.build import megatron_config
        from parallel.compat import prepare_host
        from parallel.config import ModelConfig, ParallelConfig
        from parallel.groups import init_groups

        self.device = prepare_host()
        if self.device.type != "cpu":
            raise CheckpointError(
                "the comparison runs on the CPU, and a GPU is in use by this process; set "
                "CUDA_VISIBLE_DEVICES to nothing, or export with --no-verify"
            )
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            self.model = ModelConfig(**source.manifest["config"]["model"])
        except ValidationError as error:
            raise CheckpointError(
                f"{source.step_dir}: the training code of this version does not know its model "
                f"({error.errors()[0]['loc']}: {error.errors()[0]['msg']}); export with the "
                "version that wrote it, or with --no-verify"
            ) from error
        self.source, self.ids = source, ids
        self.alone = ParallelConfig()
        init_groups(self.alone)
        self.megatron = megatron_config(self.model, self.alone, torch.float32, deterministic=False)
        self.cu_seqlens = torch.tensor([0, ids.shape[1]], dtype=torch.int32)
        self.read: set[str] = set()

    def embed(self, rounded: torch.dtype) -> Tensor:
        """[L, hidden] of the tokens."""
        tokens, places = self.ids.unique(return_inverse=True)
        stage = self._stage(range(0), len(tokens), first=True)
        rows = picked(self.source.stored.blocks(f"weight.{EMBEDDING}"), tokens)
        self._parameters(stage)[EMBEDDING][: len(tokens)] = rows.to(rounded)
        return self._run(stage, None, places)

    def layer(self, number: int, hidden: Tensor, rounded: torch.dtype) -> Tensor:
        """[L, hidden] → the same, through one layer."""
        stage = self._stage(range(number, number + 1), self.model.vocab_size)
        self._fill(stage, rounded)
        return self._run(stage, hidden, self.ids)

    def last_stage(self, rows: int, rounded: torch.dtype) -> Any:
        """The final norm, and a head of so many rows that are still to be filled."""
        stage = self._stage(range(0), rows, last=True)
        self._fill(stage, rounded, without=(EMBEDDING, HEAD))
        return stage

    def normalised(self, stage: Any, hidden: Tensor) -> Tensor:
        """[L, hidden] → what the head reads, the same."""
        return self._run(stage, hidden, self.ids)

    def logits(self, stage: Any, weight: Tensor, hidden: Tensor) -> Tensor:
        """[L, rows] of hidden states [L, hidden] before the final norm; weight [rows, hidden]."""
        parameters = self._parameters(stage)
        parameters[EMBEDDING if stage.tied_head else HEAD][: len(weight)] = weight
        stage.set_input_tensor(hidden[:, None])
        logits: Tensor = stage.logits(self.ids, self._positions(), self.cu_seqlens)
        return logits[:, : len(weight)]

    def refuse_unread(self) -> None:
        """Raise CheckpointError when the training code has no place for a weight."""
        if left := sorted(self.source.shapes.keys() - self.read):
            raise CheckpointError(f"{self.source.step_dir}: the training code lacks {left[:4]}")

    def _stage(self, layers: range, rows: int, *, first: bool = False, last: bool = False) -> Any:
        from parallel.model import PipelineStage

        stage = PipelineStage(
            self.model.model_copy(update={"vocab_size": rows}),
            self.megatron,
            layers,
            first=first,
            last=last,
            recompute=self.alone.recompute_of,
            seq_len=self.ids.shape[1],
            device=self.device,
        )
        return stage.eval()

    def _parameters(self, stage: Any) -> dict[str, nn.Parameter]:
        found = dict(stage.named_parameters())
        if unknown := sorted(found.keys() - self.source.shapes.keys()):
            raise CheckpointError(f"{self.source.step_dir} lacks {unknown[:4]}, which training has")
        self.read |= found.keys()
        return found

    def _fill(self, stage: Any, rounded: torch.dtype, without: tuple[str, ...] = ()) -> None:
        for name, parameter in self._parameters(stage).items():
            if name in without:
                continue
            if tuple(parameter.shape) != self.source.shapes[name]:
                raise CheckpointError(
                    f"{self.source.step_dir}: {name} is {self.source.shapes[name]}, the training "
                    f"code has {tuple(parameter.shape)}"
                )
            for rows, block in self.source.stored.blocks(f"weight.{name}"):
                parameter[rows.start : rows.stop] = block.to(stored_dtype(name, rounded))

    def _run(self, stage: Any, hidden: Tensor | None, ids: Tensor) -> Tensor:
        stage.set_input_tensor(None if hidden is None else hidden[:, None])
        output: Tensor = stage.hidden(ids, self._positions(), self.cu_seqlens)
        return output.squeeze(1).clone()

    def _positions(self) -> Tensor:
        return torch.arange(self.ids.shape[1])[None]


class ExportedModel:
    """The model of a folder, in float32, of which a layer at a time is in memory."""

    def __init__(self, folder: Path, ids: Tensor) -> None:
        self.folder, self.ids = folder, ids
        self.tensors = SafetensorsFolder(folder)
        try:
            self.config = read_config(folder)
            self.model = empty_model(self.config, self.tensors.shapes(), folder)
        except ModelError as error:
            raise CheckpointError(str(error)) from error
        self.model.eval()
        self.head = EMBEDDING if self.model.lm_head is None else HEAD

    def embed(self) -> Tensor:
        """[L, hidden] of the tokens."""
        tokens, places = self.ids.unique(return_inverse=True)
        self.hold(EMBEDDING, picked(self.tensors.blocks(EMBEDDING), tokens))
        embedded: Tensor = self.model.model.word_embed(places)[0]
        self.free(self.model.model.word_embed)
        return embedded

    def layer(self, number: int) -> nn.Module:
        """With its weights; to be given back to `free`."""
        return self._filled(f"model.layers.{number}.")

    def run(self, number: int, hidden: Tensor) -> Tensor:
        """[L, hidden] → the same, through a layer that is filled."""
        backbone, length = self.model.model, self.ids.shape[1]
        attends, angles = self.config.is_attention(number), None
        if self.config.rope == "unified" or (self.config.rope != "none" and attends):
            table = backbone.attn_table if attends else backbone.ssd_table
            angles = table.at(slice(length), length, torch.device("cpu"))
        output: Tensor = backbone.layers[number](hidden[None], angles, None)
        return output[0]

    def final_norm(self) -> nn.Module:
        """With its weights."""
        return self._filled("model.final_layernorm.")

    def free(self, module: nn.Module) -> None:
        """Give the memory of its weights back."""
        module.to("meta")

    def _filled(self, prefix: str) -> nn.Module:
        module = self.model.get_submodule(prefix.removesuffix("."))
        for name, parameter in list(module.named_parameters(prefix.removesuffix("."))):
            value = torch.empty(parameter.shape, device="cpu")
            for rows, block in self.tensors.blocks(name):
                value[rows.start : rows.stop] = block
            self.hold(name, value)
        return module

    def hold(self, name: str, value: Tensor) -> None:
        """Make `value` the parameter; of embedding and head, it may be some of the rows."""
        owner, _, last = name.rpartition(".")
        setattr(self.model.get_submodule(owner), last, nn.Parameter(value.float(), False))


def picked(blocks: Iterator[tuple[range, Tensor]], wanted: Tensor) -> Tensor:
    """Rows `wanted` (ascending) of a tensor that comes in blocks."""
    return torch.cat(
        [
            block[wanted[(wanted >= rows.start) & (wanted < rows.stop)] - rows.start]
            for rows, block in blocks
        ]
    )


def _compare_embedding(training: TrainingCode, exported: ExportedModel, runs: list[Run]) -> Tensor:
    own = exported.embed()
    for run in runs:
        run.hidden = training.embed(run.rounded)
        run.disturbed = disturbed(own, run.bound)
        run.note("embedding", worst_difference(own, run.hidden))
    return own


def _compare_layer(
    training: TrainingCode, exported: ExportedModel, runs: list[Run], number: int, own: Tensor
) -> Tensor:
    """What the exported layer makes of its own hidden states [L, hidden]."""
    outputs = [training.layer(number, run.hidden, run.rounded) for run in runs]
    layer = exported.layer(number)
    what = f"layer {number} ({'attention' if exported.config.is_attention(number) else 'ssd'})"
    for run, expected in zip(runs, outputs, strict=True):
        # a layer adds little to what passes by it, and is measured by that little; with other
        # weights, what passes by differs as well
        unit = expected - run.hidden if run.bound == SAME_WEIGHTS else expected
        run.note(what, worst_difference(exported.run(number, run.hidden), expected, unit))
        run.hidden, run.disturbed = expected, exported.run(number, run.disturbed)
    own = exported.run(number, own)
    exported.free(layer)
    return own


def _compare_head(
    training: TrainingCode, exported: ExportedModel, runs: list[Run], own: Tensor
) -> None:
    """Final norm, head, and logits end to end; a block of the vocabulary at a time."""
    norm, logits, name = exported.final_norm(), exported.model.logits, exported.head
    blocks = exported.tensors.blocks(name)
    largest = next(blocks)
    stages = [training.last_stage(len(largest[0]), run.rounded) for run in runs]
    finals = [training.normalised(s, run.hidden) for s, run in zip(stages, runs, strict=True)]
    own, noisy = norm(own), [norm(run.disturbed) for run in runs]
    sums = [Sums(len(own)) for _ in runs]
    for rows, block in chain([largest], blocks):
        exported.hold(name, block)
        weight = training.source.stored.rows(f"weight.{name}", rows)
        mine = logits(own)
        for run, stage, final, other, total in zip(runs, stages, finals, noisy, sums, strict=True):
            expected = training.logits(stage, weight.to(run.rounded).float(), run.hidden)
            total.expected += squares(expected)
            total.head += squares(logits(final), expected)
            total.whole += squares(mine, expected)
            total.own += squares(mine)
            total.disturbed += squares(logits(other), mine)
    for run, final, total in zip(runs, finals, sums, strict=True):
        run.note("final norm", worst_difference(norm(run.hidden), final))
        run.note("head", worst_ratio(total.head, total.expected))
        # About 1 in trained models; some deep ones make more of any error, whoever computes them.
        amplification = worst_ratio(total.disturbed, total.own) / run.bound
        deep = run.bound * max(1.0, amplification)
        if run.bound != SAME_WEIGHTS:  # what rounding does adds up as independent errors do
            deep *= math.sqrt(exported.config.num_hidden_layers + 1)
        run.note("logits, end to end", worst_ratio(total.whole, total.expected), deep)


class Sums:
    """Squared norms of the tokens' logits and of their differences [L], float64: see above."""

    def __init__(self, tokens: int) -> None:
        self.expected, self.head, self.whole, self.own, self.disturbed = torch.zeros(
            5, tokens, dtype=torch.float64
        )


def disturbed(hidden: Tensor, size: float) -> Tensor:
    """Hidden states [L, hidden] with a random vector of relative length `size` added to each."""
    by = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    return hidden + by * size * hidden.norm(dim=-1, keepdim=True) / by.norm(dim=-1, keepdim=True)


def squares(found: Tensor, other: Tensor | None = None) -> Tensor:
    """|found - other|² of every row, float64 [L]."""
    gap = found.double() if other is None else found.double() - other.double()
    return gap.square().sum(-1)


def worst_difference(found: Tensor, expected: Tensor, unit: Tensor | None = None) -> float:
    """Largest |found - expected| / |unit| of a token, in the Euclidean norm of its vector.

    All [L, n]. unit: [expected]; counts as at least a tenth of `expected`, which is rounded to
    float32 in any case. See `worst_ratio`.
    """
    size = squares(expected)
    if unit is not None:
        size = torch.maximum(squares(unit), size * 0.01)
    return worst_ratio(squares(found, expected), size)


def worst_ratio(difference: Tensor, size: Tensor) -> float:
    """Largest √(difference / size) of a token; both squared norms [L], float64.

    A size counts as at least the median token's, for what cancels to nearly nothing in one of them.
    NaN where something is not finite.
    """
    size = torch.maximum(size, size.median()).clamp(min=1e-60)
    ratio = (difference / size).sqrt()
    return float(ratio.max()) if bool(ratio.isfinite().all()) else math.nan
