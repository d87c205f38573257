"""The configuration tree: TOML file, dotted overrides on the command line, cross-field checks.

Order: defaults < file < command line. Imports neither torch nor DeepSpeed, so that a bad
configuration dies before anything is built.
"""

import codecs
import difflib
import math
import tomllib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError, model_validator

from checkpoints_tools.config import CheckpointConfig
from data_pipeline.config import DataConfig
from parallel import bounds
from parallel.config import ModelConfig, ParallelConfig, Section, printed, some_divisors
from pretrain.credentials import restored
from pretrain.overrides import read_value, suggestion
from pretrain.phases import Phase, length, phase_at, run_phases
from pretrain.sections import LoggingConfig, OptimizerConfig, TrainingConfig
from untrusted.errors import UnsafeFileError, UserError
from untrusted.files import read_regular
from untrusted.names import check_local

MAX_BYTES = 1 << 20  # of a configuration file


class ConfigError(UserError):
    """The configuration cannot be used; the message names the field, the value and what to do."""

    exit_code = 2


class LayoutError(ConfigError, ValueError):
    """The model cannot be split so; a ValueError, which pydantic takes for invalid values."""


class Config(Section):
    """The whole tree."""

    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The parts of the run, in order."""
        training = self.training
        return tuple(run_phases(self.data, training.global_batch_size, training.micro_batch_size))

    def __copy__(self) -> "Config":
        """Without the phases: model_copy may be about to replace what they follow from."""
        copied = super().__copy__()
        copied.__dict__.pop("phases", None)
        return copied

    def with_phases(self, phases: Sequence[Phase]) -> "Config":
        """The same configuration for a run that has gone through other phases."""
        changed = self.model_copy()
        changed.__dict__["phases"] = tuple(phases)
        return changed

    def phase_at(self, step: int) -> Phase:
        """The part of the run that makes the step after so many."""
        return phase_at(self.phases, step)

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return length(self.phases, self.training.steps, self.training.tokens)[0]

    @property
    def total_tokens(self) -> int:
        """Of the whole run, padding included."""
        return length(self.phases, self.training.steps, self.training.tokens)[1]

    @property
    def seq_lens(self) -> list[int]:
        """Of every phase."""
        return [phase.seq_len for phase in self.phases]

    @property
    def checkpoint_dir(self) -> Path:
        """Folder of the step-* folders."""
        return Path(self.checkpoint.dir or Path(self.logging.run_dir) / "checkpoints")

    @model_validator(mode="after")
    def _check(self) -> "Config":
        _check_places(self)
        _check_training(self)
        _check_compile(self)
        check_layout(self.model, self.parallel)
        _check_sequence(self)
        return self

    def data_parallel(self, world_size: int) -> int:
        """Data-parallel ranks of this layout on `world_size` processes.

        Raises ConfigError when the layout does not fit the processes or the batch.
        """
        parallel, model_ranks = self.parallel, self.parallel.model_ranks
        if world_size % model_ranks:
            raise ConfigError(
                f"parallel.tensor={parallel.tensor} × parallel.pipeline={parallel.pipeline} × "
                f"parallel.context={parallel.context} = {model_ranks} does not divide the "
                f"{world_size} processes of this job; start a multiple of {model_ranks} "
                "processes or use a smaller layout"
            )
        data_parallel = world_size // model_ranks
        for phase in self.phases:
            self._check_batch(phase, data_parallel)
        return data_parallel

    def usable_nodes(self, nodes: int, tasks_per_node: int) -> int:
        """The largest part of so many nodes that this layout and batch can use.

        Raises ConfigError when there is none.
        """
        multiple, ranks = self._multiple_of_data_parallel(), self.parallel.model_ranks
        for used in range(nodes if multiple else 0, 0, -1):
            data_parallel, rest = divmod(used * tasks_per_node, ranks)
            if not rest and not multiple % data_parallel:
                return used
        try:
            self.data_parallel(nodes * tasks_per_node)
        except ConfigError as error:
            raise ConfigError(
                f"no number of nodes up to {nodes}, with {tasks_per_node} tasks each, can be used; "
                f"{nodes} nodes: {error}"
            ) from error
        raise AssertionError("data_parallel takes what usable_nodes refuses")

    def _multiple_of_data_parallel(self) -> int:
        """Which numbers of replicas `_check_batch` takes in every phase: the divisors of this; 0:
        none. There may be many phases, and many nodes that are tried."""
        shares = []
        for phase in self.phases:
            interleaved = self.parallel.virtual_pipeline > 1
            unit = phase.micro_batch_size * (self.parallel.pipeline if interleaved else 1)
            if phase.global_batch_size % unit:
                return 0
            shares.append(phase.global_batch_size // unit)
        return math.gcd(*shares)

    def _check_batch(self, phase: Phase, data_parallel: int) -> None:
        parallel, batch, micro = self.parallel, phase.global_batch_size, phase.micro_batch_size
        where = "training" if not phase.first_step else f"data.stages from step {phase.first_step}"
        share = micro * data_parallel
        if batch % share:
            raise ConfigError(
                f"{where}.global_batch_size={batch} is not a multiple of {where}.micro_batch_size="
                f"{micro} × data parallel {data_parallel} = {share}; use "
                f"{_nearest_multiple(batch, share)}"
            )
        micro_batches = batch // share
        if parallel.virtual_pipeline > 1 and micro_batches % parallel.pipeline:
            raise ConfigError(
                f"parallel.virtual_pipeline={parallel.virtual_pipeline} takes micro-batches by "
                f"parallel.pipeline={parallel.pipeline}, and {where}.global_batch_size="
                f"{batch} gives each rank {micro_batches} of them; use {where}.global_batch_size="
                f"{_nearest_multiple(batch, share * parallel.pipeline)}, or "
                "parallel.virtual_pipeline=1"
            )


def _check_places(config: Config) -> None:
    """What a run writes; data alone may be remote."""
    logging = config.logging
    check_local(logging.run_dir, "logging.run_dir")
    check_local(logging.prometheus_file, "logging.prometheus_file")
    check_local(config.checkpoint.dir, "checkpoint.dir")
    check_local(config.data.cache_dir, "data.cache_dir")


def _check_training(config: Config) -> None:
    training, checkpoint = config.training, config.checkpoint
    if checkpoint.load_weights_only and checkpoint.resume not in ("auto", "none"):
        raise ValueError(
            f"checkpoint.resume={checkpoint.resume!r} takes the whole state, "
            f"checkpoint.load_weights_only={checkpoint.load_weights_only!r} the weights alone; "
            "use one of them"
        )
    if bool(training.steps) == bool(training.tokens):
        raise ValueError(
            f"training.steps={training.steps} and training.tokens={training.tokens}: set exactly "
            "one of them (the other to 0)"
        )
    if training.global_batch_size % training.micro_batch_size:
        raise ValueError(
            f"training.micro_batch_size={training.micro_batch_size} does not divide "
            f"training.global_batch_size={training.global_batch_size}; use one of "
            f"{some_divisors(training.global_batch_size, training.micro_batch_size)}"
        )
    if (total := _largest_total(config)) > bounds.TOKENS:
        raise ValueError(
            f"training.steps={training.steps} and training.tokens={training.tokens} make a run of "
            f"{total:,} tokens, more than {bounds.TOKENS:,}; make it shorter"
        )
    if training.eval_every and not config.data.validation:
        raise ValueError(
            f"training.eval_every={training.eval_every} needs data.validation; name a prepared "
            "folder or set training.eval_every=0"
        )
    if max(config.seq_lens) > config.model.max_position_embeddings:
        raise ValueError(
            f"data.seq_len={max(config.seq_lens)} exceeds model.max_position_embeddings="
            f"{config.model.max_position_embeddings}; raise the latter or shorten the sequences"
        )


def _check_compile(config: Config) -> None:
    parallel = config.parallel
    if config.training.compile == "none":
        return
    for field, largest in (("tensor", 1), ("context", 1), ("zero_stage", 2)):
        if (value := getattr(parallel, field)) > largest:
            raise ValueError(
                f'training.compile="layers" with parallel.{field}={value}: ranks communicate '
                "within a layer, which no single graph can hold; set training.compile="
                f'"none" or parallel.{field}={largest}'
            )


def _largest_total(config: Config) -> int:
    """Tokens of the run in its largest steps, an upper bound."""
    tokens_per_step = max(phase.tokens_per_step for phase in config.phases)
    return max(config.training.steps * tokens_per_step, config.training.tokens)


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise LayoutError where the model cannot be split so."""
    tensor = parallel.tensor
    split = {
        "num_heads": model.num_heads,
        "num_kv_heads": model.num_kv_heads,
        "ssd_groups": model.ssd_groups,
        "intermediate_size": model.intermediate_size,
        "padded_vocab_size": model.padded_vocab_size,
    }
    common = math.gcd(*split.values())
    for field, value in split.items():
        if value % tensor:
            reason = {
                "ssd_groups": " (ranks do not share a group's B and C)",
                "num_kv_heads": " (ranks do not share a key head)",
            }.get(field, "")
            raise LayoutError(
                f"parallel.tensor={tensor} does not divide model.{field}={value}{reason}; "
                f"use one of {some_divisors(common, tensor)}"
            )
    _check_pipeline(model, parallel)
    _check_zero(parallel)
    if parallel.recompute_layers and parallel.recompute == "none":
        raise LayoutError(
            f"parallel.recompute_layers={parallel.recompute_layers} with parallel.recompute='none' "
            "recomputes nothing; use parallel.recompute='selective' or 'full', or "
            "parallel.recompute_layers=0"
        )


def _check_pipeline(model: ModelConfig, parallel: ParallelConfig) -> None:
    if parallel.pipeline > model.num_layers:
        raise LayoutError(
            f"parallel.pipeline={parallel.pipeline} is more stages than model.num_layers="
            f"{model.num_layers}; use at most {model.num_layers}"
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise LayoutError(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} divides stages, and "
            "parallel.pipeline=1 has none; use parallel.virtual_pipeline=1, or parallel.pipeline=2 "
            "or more"
        )
    if parallel.num_chunks > model.num_layers:
        raise LayoutError(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} × parallel.pipeline="
            f"{parallel.pipeline} = {parallel.num_chunks} is more chunks than model.num_layers="
            f"{model.num_layers}; use parallel.virtual_pipeline="
            f"{model.num_layers // parallel.pipeline} at most"
        )
    counts = parallel.pipeline_split
    if counts != "balanced" and (
        len(counts) != parallel.num_chunks or sum(counts) != model.num_layers or min(counts) < 1
    ):
        raise LayoutError(
            f"parallel.pipeline_split={counts} must list {parallel.num_chunks} numbers ≥ 1 "
            "(parallel.pipeline × parallel.virtual_pipeline) that sum to model.num_layers="
            f"{model.num_layers}; or use 'balanced'"
        )


def _check_zero(parallel: ParallelConfig) -> None:
    """What DeepSpeed does together: any stage without pipeline stages, stage 1 with them; the
    optimizer offloaded from any sharded stage without pipeline stages."""
    stage, pipeline = parallel.zero_stage, parallel.pipeline
    if pipeline > 1 and stage > 1:
        raise LayoutError(
            f"parallel.zero_stage={stage} with parallel.pipeline={pipeline}: ZeRO 2 and 3 reduce "
            "gradients in backward hooks, which cannot follow several micro-batches in flight; use "
            "parallel.zero_stage=1, or parallel.pipeline=1"
        )
    if pipeline > 1 and stage == 0:
        raise LayoutError(
            f"parallel.zero_stage=0 with parallel.pipeline={pipeline}: stage 1 sends as much and "
            "keeps less; use parallel.zero_stage=1, or parallel.pipeline=1"
        )
    if parallel.offload == "optimizer" and pipeline > 1:
        raise LayoutError(
            f"parallel.offload='optimizer' with parallel.pipeline={pipeline}: gradients move to "
            "the host in backward hooks, which cannot follow several micro-batches in flight; use "
            "parallel.offload='none', or parallel.pipeline=1"
        )
    if parallel.offload == "optimizer" and stage == 0:
        raise LayoutError(
            "parallel.offload='optimizer' with parallel.zero_stage=0: every rank of a node would "
            "keep a whole copy on the host; use parallel.zero_stage=1, 2 or 3, or "
            "parallel.offload='none'"
        )


def _check_context(model: ModelConfig, parallel: ParallelConfig, seq_len: int) -> None:
    context = parallel.context
    if context == 1:
        return
    if seq_len % context:
        raise ValueError(
            f"parallel.context={context} does not divide data.seq_len={seq_len}; use one of "
            f"{some_divisors(seq_len, context)}"
        )
    if model.ssd_conv_width:
        raise ValueError(
            f"parallel.context={context} with model.ssd_conv_width={model.ssd_conv_width}: the "
            "convolution would reach into tokens of another rank; use parallel.context=1 or "
            "model.ssd_conv_width=0"
        )


def _check_sequence(config: Config) -> None:
    parallel = config.parallel
    for phase in config.phases:
        _check_context(config.model, parallel, phase.seq_len)
        tokens = phase.micro_batch_size * phase.seq_len // parallel.context
        if parallel.sequence_parallel and tokens % parallel.tensor:
            raise ValueError(
                f"training.micro_batch_size × data.seq_len / parallel.context = {tokens} tokens "
                f"cannot be split over parallel.tensor={parallel.tensor} ranks; choose sizes it "
                "divides, or set parallel.sequence=false"
            )


def _nearest_multiple(n: int, of: int) -> str:
    below, above = n // of * of, (n // of + 1) * of
    return f"{below} or {above}" if below else str(above)


# -- reading and writing ------------------------------------------------------------------------


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a TOML file, apply `--section.field value` overrides, validate.

    Raises ConfigError, one paragraph, naming field, value and the nearest valid name.
    """
    try:
        content = read_regular(Path(path), MAX_BYTES, follow_link=True)
        tree = tomllib.loads(content.removeprefix(codecs.BOM_UTF8).decode())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except UnsafeFileError as error:
        raise ConfigError(f"cannot read the configuration: {error}") from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets, too
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    pairs = _override_pairs(overrides or [])
    for name, text in pairs:
        _apply_override(tree, name, text)
    _keep_one_length(tree, {name for name, _ in pairs})
    try:
        return parse_config(restored(tree))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_config(tree: dict[str, Any]) -> Config:
    """Validate a tree of plain values. Raises ConfigError."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(
            "invalid configuration: " + "; ".join(_explain(e) for e in error.errors())
        ) from error


def dump_config(config: Config) -> str:
    """The whole tree as TOML; load_config of it gives an equal Config."""
    return tomli_w.dumps(config.model_dump(mode="json"))


def _override_pairs(words: list[str]) -> list[tuple[str, str]]:
    pairs, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or "." not in name:
            same = [other for other in _all_names() if other.rpartition(".")[2] == name]
            hint = f"; did you mean --{' or --'.join(same)}" if same else ""
            raise ConfigError(
                f"unexpected argument {word!r}: overrides are --section.field value{hint}"
            )
        if not equals:
            has_value = bool(rest) and not rest[0].startswith("--")
            if not has_value and _annotation(*name.split(".", 1)) is not bool:
                raise ConfigError(f"the override {word} lacks a value: write {word} VALUE")
            text = rest.pop(0) if has_value else "true"
        pairs.append((name, text))
    return pairs


def _keep_one_length(tree: dict[str, Any], overridden: set[str]) -> None:
    """Let training.tokens on the command line replace the file's training.steps, and conversely."""
    for name, other in (("tokens", "steps"), ("steps", "tokens")):
        if f"training.{name}" in overridden and f"training.{other}" not in overridden:
            tree["training"].pop(other, None)


def _apply_override(tree: dict[str, Any], name: str, text: str) -> None:
    section, field = name.split(".", 1)
    annotation = _annotation(section, field)
    try:
        value = read_value(text, annotation)
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise ConfigError(f"{name}={printed(text)} cannot be read: {error}") from error
    place = tree.setdefault(section, {})
    if not isinstance(place, dict):
        raise ConfigError(f"{section} in the file is not a section; write it as [{section}]")
    place[field] = value


def _annotation(section: str, field: str) -> Any:
    info = Config.model_fields.get(section)
    fields = getattr(info.annotation, "model_fields", {}) if info else {}
    return fields[field].annotation if field in fields else None


def _explain(error: Any) -> str:
    members = ("literal[", "list[", "dict[", "bool")  # pydantic's names of a union's members
    parts = [str(part) for part in error["loc"]]
    path = [part for part in parts if part != "str" and not part.startswith(members)]
    name = ".".join(path)
    if error["type"] == "extra_forbidden":
        if len(path) == 1:  # a section; a field in it, which another section has, tells more
            fields = error["input"] if isinstance(error["input"], dict) else {}
            known = {other.rpartition(".")[2] for other in _all_names()}
            names = [f"{name}.{field}" for field in fields if field in known]
            (near,) = difflib.get_close_matches(name, Config.model_fields, n=1, cutoff=0.0)
            if names and fields.keys() - _names_in([near]):
                return "; ".join(map(_unknown, names))
            return f"unknown field {name}; the nearest valid name is {near}"
        return _unknown(name)
    if error["type"] == "missing":
        return f"{name} is missing; set it in the file or with --{name}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{name}={printed(error['input'])}: {message}"


def _unknown(name: str) -> str:
    return f"unknown field {name}; the nearest valid name is {suggestion(name, _all_names())}"


def _names_in(path: list[str]) -> list[str]:
    if not path:
        return list(Config.model_fields)
    info = Config.model_fields.get(path[0])
    return list(getattr(info.annotation, "model_fields", {})) if info else []


def _all_names() -> list[str]:
    return [
        f"{section}.{field}" for section in Config.model_fields for field in _names_in([section])
    ]
