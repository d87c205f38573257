"""The sections [optimizer], [training] and [logging] of a configuration."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from parallel import bounds
from parallel.config import Section
from untrusted.paths import ConfiguredPath


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(3e-3, gt=0, le=100)
    """Peak learning rate."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Final learning rate as a fraction of the peak."""
    betas: list[float] = Field(default=[0.9, 0.95], min_length=2, max_length=2)
    eps: float = Field(1e-8, ge=bounds.SMALLEST, le=1)
    weight_decay: float = Field(0.01, ge=0, le=100)
    """Applied to projection matrices only."""
    clip_grad_norm: float = Field(1.0, ge=0, le=1e12)
    """Largest global gradient norm; 0 does not clip."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After a linear warm-up: cosine decay, or stable and then linear decay (wsd)."""
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the run's tokens spent on warm-up."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """Share of the run's tokens in the final decay of the wsd schedule."""

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ValueError(f"optimizer.betas={self.betas}: each must be in [0, 1)")
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"optimizer.warmup_fraction={self.warmup_fraction} and optimizer.decay_fraction="
                f"{self.decay_fraction} exceed the whole run together; make their sum at most 1"
            )
        return self


class TrainingConfig(Section):
    """How long, in what batches, in what precision."""

    steps: int = Field(120, ge=0, le=bounds.STEPS)
    """Updates to make; 0: as many as training.tokens needs."""
    tokens: int = Field(0, ge=0, le=bounds.TOKENS)
    """Tokens to train on, rounded up to whole steps, when training.steps is 0."""
    global_batch_size: int = Field(8, ge=1, le=bounds.BATCH)
    """Sequences per update, over all ranks."""
    micro_batch_size: int = Field(4, ge=1, le=bounds.BATCH)
    """Sequences per forward pass of one data-parallel rank."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of parameters and activations; master weights and gradient sums are float32 always."""
    seed: int = Field(1234, ge=0, le=bounds.SEED)
    """Of the initial weights."""
    z_loss: float = Field(0.0, ge=0, le=1)
    """Coefficient of z-loss: the gradient is that of the loss plus z_loss · (log Σ exp(logits))² of
    every token, which keeps the logits from drifting. PaLM uses 1e-4, OLMo 2 1e-5. The reported
    losses never include it."""
    cuda_graphs: Literal["off", "on"] = "off"
    """Capture forward, loss and backward of a micro-batch once a shape, and launch them as one:
    under ZeRO 0 or 1, without pipeline stages, context parallelism and offloading. Other layouts
    run eagerly. On a CPU a recording stands in, for tests."""
    compile: Literal["none", "layers"] = "none"
    """Run each decoder layer as one graph of torch.compile. Needs parallel.tensor=1,
    parallel.context=1 and parallel.zero_stage below 3."""
    eval_every: int = Field(50, ge=0, le=bounds.STEPS)
    """Steps between evaluations on data.validation, besides the one at the end; 0: never."""
    eval_batches: int = Field(8, ge=1, le=bounds.COUNT)
    """Global batches' worth of validation sequences in an evaluation, at most."""
    deterministic: bool = False
    """Refuse operations whose result may differ between runs."""
    on_bad_step: Literal["skip", "stop"] = "skip"
    """What a step with a loss or gradient that is not finite, or that is a spike, does to the run:
    its update is left out, or the run ends."""
    spike_deviations: float = Field(20.0, ge=0, le=bounds.LARGEST)
    """A loss, or logarithm of a gradient norm, more robust deviations than this above the median of
    recent steps is a spike; 0: none is."""
    spike_window: int = Field(128, ge=8, le=1 << 16)
    """Recent good steps that spikes are told by; before there are so many nothing is one."""
    bad_steps_in_a_row: int = Field(3, ge=0, le=bounds.COUNT)
    """After which the run goes back to its newest checkpoint and passes over the data of these
    steps; 0: never."""
    max_rollbacks: int = Field(3, ge=0, le=bounds.COUNT)
    """Of the run, before it ends with a report."""
    stop_before_limit: float = Field(120.0, ge=0, le=bounds.SECONDS)
    """Seconds before the end of a Slurm job's time at which to save and stop; 0: when told by a
    signal only."""
    hang_timeout: float = Field(600.0, ge=0, le=bounds.SECONDS)
    """Seconds without progress after which the job writes where it is and ends, to be started
    again; 0: never."""

    @model_validator(mode="before")
    @classmethod
    def _tokens_replace_steps(cls, fields: Any) -> Any:
        """training.tokens alone means that steps follow from it, whatever their default."""
        if isinstance(fields, dict) and fields.get("tokens") and "steps" not in fields:
            return fields | {"steps": 0}
        return fields


class LoggingConfig(Section):
    """The run directory and what goes into it."""

    run_dir: ConfiguredPath = "runs/demo"
    """Folder of the run: configuration, metrics, logs, checkpoints."""
    every: int = Field(1, ge=1, le=bounds.STEPS)
    """Steps between progress lines; metrics.jsonl has every step."""
    tensorboard: bool = True
    stragglers_every: int = Field(100, ge=0, le=bounds.STEPS)
    """Steps between looks for ranks that are slower than their peers; 0: never."""
    vitals_every: int = Field(50, ge=0, le=bounds.STEPS)
    """Steps between looks at norms, update ratios, activations and decays by kind of layer; 0:
    never."""
    profile_steps: list[Annotated[int, Field(ge=1, le=bounds.STEPS)]] = Field(default=[])
    """Steps of which logging.profile_ranks write a trace of torch's profiler."""
    profile_ranks: list[Annotated[int, Field(ge=0, lt=bounds.RANKS)]] = Field(default=[0])
    wandb_project: str = ""
    """Send the metrics to Weights & Biases, too."""
    prometheus_file: ConfiguredPath = ""
    """Keep the newest metrics in a file of Prometheus's text format (*.prom), too."""
