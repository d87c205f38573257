"""The whole way in minutes on two CPU cores: `make demo`.

Real text of this machine → tokenizer → shards → training, killed and resumed in the middle →
single-GPU model → generated text. Everything goes through the `transxssm` command, as a user would.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from data_pipeline.dataset import PackedDataset
from data_pipeline.demo import demo_corpus

DATA = Path("data/demo")
CORPUS = Path("data/demo-corpus.tmp")
RUN = Path("runs/demo")
CONFIG = Path("configs/demo.toml")
KILL_AFTER_STEP = 50
PROMPT = "def __init__(self"


def main() -> int:
    """Run the demo. Returns the exit code: 1 when the model has not learned."""
    begin = time.perf_counter()
    prepare_data()
    shutil.rmtree(RUN, ignore_errors=True)
    say("training; it is killed once on the way and started again by the same command")
    train_until(KILL_AFTER_STEP)
    command("pretrain", str(CONFIG))
    metrics = read_metrics()
    entropy = PackedDataset(DATA / "validation").meta.unigram_entropy
    validation = [m["validation_loss"] for m in metrics if "validation_loss" in m][-1]
    draw(metrics, entropy)
    say("exporting the last checkpoint to a single-GPU model")
    command("checkpoint", "export", str(RUN), str(RUN / "model"))
    say(f"continuing {PROMPT!r}")
    command("generate", str(RUN / "model"), "--prompt", PROMPT, "--max-new-tokens", "80",
            "--temperature", "0.7", "--seed", "1")  # fmt: skip
    steps = [int(m["step"]) for m in metrics]
    learned = validation < entropy - 0.5 and steps == list(range(1, steps[-1] + 1))
    say(
        f"done in {time.perf_counter() - begin:.0f} s. Validation loss {validation:.3f} nats a "
        f"token, unigram entropy {entropy:.3f}: the model has {'' if learned else 'NOT '}learned."
    )
    print(
        f"  loss curve    {RUN}/loss.png\n"
        f"  TensorBoard   .venv/bin/tensorboard --logdir {RUN}/tensorboard\n"
        f"  run directory {RUN} (config.toml, metrics.jsonl, logs/, checkpoints/, model/)"
    )
    return 0 if learned else 1


def prepare_data() -> None:
    """Corpus, tokenizer and shards, unless an earlier demo made them."""
    if (DATA / "train").is_dir() and (DATA / "validation").is_dir():
        say(f"using the shards in {DATA}")
        return
    for folder in (DATA, CORPUS):  # of a demo that was interrupted
        shutil.rmtree(folder, ignore_errors=True)
    say("gathering text: this Python's standard library and documentation topics")
    corpus = demo_corpus(CORPUS)
    print(f"{corpus.num_bytes / 1e6:.1f} MB in {corpus.files} files")
    say("training a byte-level BPE of 8192 tokens")
    command("tokenizer", "train", str(corpus.folder), "--out", str(corpus.folder / "tokenizer"))
    say("tokenising and packing")
    command("prepare", str(corpus.folder), "--out", str(DATA), "--seq-len", "1024",
            "--validation-fraction", "0.05",
            "--tokenizer", str(corpus.folder / "tokenizer"))  # fmt: skip
    shutil.rmtree(corpus.folder)


def train_until(step: int) -> None:
    """Start training and kill it, with SIGKILL, once it has made `step` steps."""
    process = subprocess.Popen([*transxssm(), "pretrain", str(CONFIG)])
    while process.poll() is None and (len(read_metrics()) < step):
        time.sleep(0.2)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.wait()
        say(f"killed after step {len(read_metrics())}; starting the same command again")
    elif process.returncode != 0:
        sys.exit(process.returncode)


def read_metrics() -> list[dict[str, float]]:
    """The run's metrics so far, whole lines only."""
    path = RUN / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def draw(metrics: list[dict[str, float]], entropy: float) -> None:
    """The loss curve as a PNG in the run directory."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([m["step"] for m in metrics], [m["loss"] for m in metrics], label="training")
    evaluated = [m for m in metrics if "validation_loss" in m]
    losses = [m["validation_loss"] for m in evaluated]
    axes.plot([m["step"] for m in evaluated], losses, "o-", label="validation")
    axes.axhline(entropy, color="grey", linestyle="--", label="unigram entropy of validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="TransXSSM demo")
    axes.legend()
    figure.savefig(RUN / "loss.png", dpi=120)


def command(*words: str) -> None:
    """Run `transxssm WORDS`; a failure ends the demo with its exit code."""
    done = subprocess.run([*transxssm(), *words])
    if done.returncode != 0:
        sys.exit(done.returncode)


def transxssm() -> list[str]:
    """The command in this environment."""
    return [sys.executable, "-m", "pretrain"]


def say(text: str) -> None:
    """A headline of the demo."""
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n{bold}== {text}{plain}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
