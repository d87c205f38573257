"""Commands of `transxssm`, and which files of a prepared folder each of them reads."""

from dataclasses import dataclass

STEP = "run/checkpoints/step-00000006"
OLD_STEP = "old/step-00000003"
RECORD = (
    "run/metrics.jsonl", "run/events.jsonl", "run/environment.json", "run/jobs.jsonl",
    "run/checkpoints.json", "run/logs/first_failure.txt", "run/checkpoints/latest",
)  # fmt: skip
CHECKPOINT = (f"{STEP}/*", f"{STEP}/*.json", "run/checkpoints/latest")
DATA = ("data/*/*", "data/*/*.json", "data/tokenizer.json")
ZSTD_DATA = ("data-zstd/train/*", "data-zstd/train/*.json")
TAR_DATA = ("data-tar/train/*", "data-tar/train/*.json")
MODEL = ("model/*", "model/*.json")
SLURM = ("slurm/*", "run/jobs.jsonl", "cluster.toml", "run/preflight.json")
RESUMED = (
    *RECORD,
    *CHECKPOINT,
    "run/skipped_windows.json",
    "run/logs/rank-0.log",
    "run/tensorboard",
)


@dataclass(frozen=True)
class Command:
    """A command line, in the folder that benchmarks.fuzz prepares."""

    words: str
    reads: tuple[str, ...]
    """Globs of the files that may be damaged for it."""
    weight: int = 2
    """How often it is chosen."""
    trains: bool = False
    builds: bool = False
    """It makes the model, as what trains does: large ones take their time."""


COMMANDS: dict[str, Command] = {
    "status": Command("status run", (*RECORD, *SLURM, "run/config.toml"), 4),
    "status --json": Command("status run --json", (*RECORD, *SLURM, "run/config.toml")),
    "runs": Command("runs .", (*RECORD, *SLURM, "run/config.toml"), 4),
    "runs --json": Command("runs . --json", (*RECORD, *SLURM, "run/config.toml")),
    "logs": Command("logs run", ("run/job-41.log",)),
    "logs --rank": Command("logs run --rank 0", ("run/logs/rank-0.log",)),
    "cancel": Command("cancel run", SLURM),
    "bad-nodes": Command("bad-nodes config.toml", ("run/preflight.json",)),
    "submit --dry-run": Command("submit config.toml --nodes 1 --dry-run", ("cluster.toml",)),
    "submit": Command("submit config.toml --nodes 1 --after 41", SLURM),
    "report": Command("report run", (*RECORD, *CHECKPOINT, "run/config.toml"), 4),
    "checkpoint list": Command("checkpoint list run", CHECKPOINT, 3),
    "checkpoint list --json": Command("checkpoint list run --json", CHECKPOINT),
    "checkpoint inspect": Command("checkpoint inspect run --tensors", CHECKPOINT, 3),
    "checkpoint inspect old": Command(f"checkpoint inspect {OLD_STEP}", (f"{OLD_STEP}/*",)),
    "checkpoint verify": Command("checkpoint verify run", CHECKPOINT, 3),
    "checkpoint verify --deep": Command("checkpoint verify --deep run --json", CHECKPOINT, 3),
    "checkpoint verify old": Command(
        f"checkpoint verify --deep {OLD_STEP}", (f"{OLD_STEP}/*", f"{OLD_STEP}/.metadata")
    ),
    "checkpoint diff": Command(
        f"checkpoint diff run/checkpoints/step-00000004 {STEP}", CHECKPOINT, 3
    ),
    "checkpoint average": Command(
        f"checkpoint average run/checkpoints/step-00000004 {STEP} --out averaged", CHECKPOINT, 3
    ),
    "checkpoint export": Command("checkpoint export run exported", (*CHECKPOINT, *DATA), 3),
    "checkpoint export old": Command(
        f"checkpoint export {OLD_STEP} exported --no-verify",
        (f"{OLD_STEP}/*", f"{OLD_STEP}/.metadata"),
    ),
    "checkpoint import": Command("checkpoint import model imported", MODEL, 3),
    "checkpoint import --config": Command(
        "checkpoint import model imported --config config.toml", (*MODEL, *DATA)
    ),
    "generate": Command("generate model --prompt the --max-new-tokens 3", MODEL, 4),
    "evaluate model": Command("evaluate model --data data/validation --limit 2", (*MODEL, *DATA)),
    "evaluate run": Command("evaluate run --data data/validation --limit 2", (*CHECKPOINT, *DATA)),
    "evaluate text": Command("evaluate model --text text --limit 2", ("text/*",)),
    "data inspect": Command("data inspect data", DATA, 3),
    "data inspect zstd": Command("data inspect data-zstd", ZSTD_DATA),
    "data inspect tar": Command("data inspect data-tar", TAR_DATA),
    "data verify": Command("data verify data", DATA, 3),
    "data verify zstd": Command("data verify data-zstd", ZSTD_DATA),
    "data verify tar": Command("data verify data-tar", TAR_DATA),
    "tokenizer inspect": Command("tokenizer inspect tokenizer", ("tokenizer/tokenizer.json",)),
    "tokenizer train": Command(
        "tokenizer train text --out tokenizer-2 --vocab-size 300", ("text/*",)
    ),
    "prepare": Command(
        "prepare text --out prepared --tokenizer tokenizer --seq-len 64 --workers 1",
        ("text/*", "tokenizer/tokenizer.json"), 4,
    ),
    "prepare again": Command(
        "prepare text --out begun --tokenizer tokenizer --seq-len 64 --workers 1 --shard 2/2",
        ("begun.tmp/units/*/*", "begun.tmp/.transxssm-prepare*"), 3,
    ),
    "prepare --merge": Command(
        "prepare text --out begun --tokenizer tokenizer --seq-len 64 --workers 1 --merge",
        ("begun.tmp/units/*/*", "begun.tmp/units/*/*/*", "begun.tmp/.transxssm-prepare*"), 3,
    ),
    "pretrain": Command("pretrain config.toml --training.steps 8", (*RESUMED, *DATA), 6, True),
    "pretrain zstd": Command(
        "pretrain config.toml --training.steps 7 --data.train data-zstd/train "
        "--checkpoint.allow_data_change true",
        ("data-zstd/train/*", "home/cache/*", "home/cache/*/*", "home/cache/*/*/*"), 3, True,
    ),
    "pretrain from old": Command(
        f"pretrain config.toml --logging.run_dir new --checkpoint.load_weights_only {OLD_STEP} "
        "--checkpoint.allow_tokenizer_change true --training.steps 1 --model.vocab_size 301 "
        "--model.intermediate_size 32 --model.num_layers 2 --model.ssd_conv_width 3 "
        "--model.ssd_skip true --model.state_dim 8",
        (f"{OLD_STEP}/*", f"{OLD_STEP}/.metadata"), 1, True,
    ),
    "pretrain from model": Command(
        "pretrain config.toml --logging.run_dir new --checkpoint.load_weights_only model "
        "--training.steps 1", MODEL, 2, True,
    ),
    "pretrain from step": Command(
        f"pretrain config.toml --logging.run_dir new --checkpoint.resume {STEP} --training.steps 7",
        (f"{STEP}/*",), 3, True,
    ),
}  # fmt: skip

CONFIGURED: dict[str, Command] = {
    "config: pretrain": Command("pretrain wild.toml", (), 6, True, builds=True),
    "config: pretrain --dry-run": Command("pretrain wild.toml --dry-run", (), 3, builds=True),
    "config: estimate": Command("estimate wild.toml", (), 6),
    "config: estimate --search": Command("estimate wild.toml --search --nodes 2", (), 3),
    "config: doctor --layout": Command("doctor --layout wild.toml --gpus-per-node 1", (), 3),
    "config: nodes": Command("nodes wild.toml --of 2 --tasks-per-node 1", (), 2),
    "config: submit": Command("submit wild.toml --nodes 2 --dry-run", (), 4),
    "config: import": Command("checkpoint import model imported --config wild.toml", (), 1),
}
"""Commands that a generated configuration, wild.toml, is given to."""
