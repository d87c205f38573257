"""A step counted without a GPU is the step that trains; golden counts; the command."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.ranks import run_ranks
from parallel.ledger import HEAD, HOOKS, Place
from pretrain import host_cost
from pretrain import launches_golden as golden
from pretrain.cli import app
from pretrain.config import Config, ConfigError, load_config
from pretrain.launches import Counts, count
from tests.pretrain.command import paragraph, run_command, write_config
from tests.tiny import tiny_config

CONFIGS = Path(__file__).parents[2] / "configs"
NOWHERE = Path("nowhere")  # counting reads no data
Kinds = dict[Place, Counter[str]]
# Attention and the head have other paths and blocks on CPUs; what a step has once is compared apart
APART = {HEAD, "schedule", "tokens"}


def tiny(**sections: dict[str, Any]) -> Config:
    model = {"head_dim": 16, "attn_layer_period": 4} | sections.pop("model", {})
    return tiny_config(NOWHERE, NOWHERE, model=model, **sections)


def counted(config: Config, rank: int = 0) -> Counts:
    """In a process of its own: a fake job would be in the way of others here."""
    (found,) = run_ranks(1, count, config, rank)
    assert isinstance(found, Counts)
    return found


# -- the code that trains ------------------------------------------------------------------------


def forced_torch(*_: Any) -> AbstractContextManager[None]:
    from kernels.audit.compiling import forced

    return forced("torch")


def counted_with_torch(config: Config) -> Counts:
    """Without Triton's kernels and float32 sums inside products, which do not run on a CPU."""
    from kernels.paths import FLOAT32_SUMS, switch_off
    from pretrain import launches

    switch_off(FLOAT32_SUMS)
    launches.record_only = forced_torch
    return launches.count(config)


def trained(config: Config) -> tuple[list[float], list[float], Kinds]:
    """Losses of a few steps of the trainer, those of another under the ledger, and the operations
    of the last step."""
    from parallel.compat import prepare_host
    from parallel.groups import init_distributed, init_groups
    from parallel.launch import launch_from_environment
    from parallel.ledger import Ledger, watch
    from pretrain import trainer as module
    from pretrain.sources import open_data

    device = prepare_host()
    init_distributed(launch_from_environment(), device)
    init_groups(config.parallel)
    data, validation = open_data(config)

    def losses(trainer: Any, ledger: AbstractContextManager[object]) -> Iterator[float]:
        batches = trainer.batches()
        for _ in range(3):
            with ledger:
                metrics = trainer.train_step(batches)
            yield metrics["loss"]
        batches.close()

    plain = list(losses(module.Trainer(config, data, validation, device), nullcontext()))
    trainer, ledger = module.Trainer(config, data, validation, device), Ledger(device)
    watch(ledger, trainer.zero)
    for name, part in (("count_tokens", "tokens"), ("forward_backward", "schedule")):
        setattr(module, name, ledger.named(getattr(module, name), part))
    counted = []
    for loss in losses(trainer, ledger):
        counted.append(loss)
        kinds = {place: tally.kinds for place, tally in ledger.tallies.items()}
        ledger.tallies = {}
    return plain, counted, kinds


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_counted_step_is_the_one_that_trains(
    dtype: str, tiny_data: Path, tmp_path: Path
) -> None:
    """The trainer has the same losses under the ledger; and what it does there, part by part, is
    what is counted on the meta device."""
    model = {"attn_layer_period": 4, "attn_layer_offset": 3}
    config = tiny_config(
        tiny_data, tmp_path, model=model, optimizer={"clip_grad_norm": 1e-3},
        training={"dtype": dtype, "global_batch_size": 2},
    )  # fmt: skip
    ((plain, losses, kinds),) = run_ranks(1, trained, config)
    assert losses == plain
    (counts,) = run_ranks(1, counted_with_torch, config)
    for place, tally in counts.micro_batch.items():
        if place.part == HOOKS and dtype == "fp32":  # the first micro-batch leaves its gradients
            continue
        if place.layer != "attention" and place.part not in APART:
            assert kinds[place] == tally.kinds, place
    for part in ("update", "gradient reduction"):
        done = kinds.get(Place("", part, "forward"), Counter())  # some layouts reduce nothing here
        assert done == counts.once[part].kinds, part


# -- what is counted -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", golden.recorded(golden.PATH))
def test_golden_counts_are_those_of_the_code(name: str) -> None:
    """When this fails: transxssm kernels launches configs/NAME --update, and read what changed."""
    assert golden.recorded_versions(golden.PATH) == golden.versions()
    assert golden.changes(name, counted(load_config(CONFIGS / name)), golden.PATH) == []


def test_the_page_shows_the_golden_counts() -> None:
    """When this fails: transxssm kernels launches configs/320m.toml --update."""
    assert golden.table(golden.PATH) in golden.PAGE.read_text()


def test_a_change_is_told_and_accepted(tmp_path: Path) -> None:
    counts = counted(tiny())
    path = tmp_path / "golden.json"
    golden.write("tiny.toml", counts, path)
    assert golden.changes("tiny.toml", counts, path) == []
    place = Place("ssd", "mixer", "forward")
    more = replace(counts, micro_batch=dict(counts.micro_batch))
    more.micro_batch[place] = replace(
        counts.micro_batch[place], kinds=counts.micro_batch[place].kinds + Counter({"cat": 2})
    )
    (change,) = golden.changes("tiny.toml", more, path)
    cats = counts.micro_batch[place].kinds["cat"]
    assert change == f"ssd layers | mixer | forward: cat {cats} → {cats + 2}"
    golden.write("tiny.toml", more, path)
    assert golden.changes("tiny.toml", more, path) == []


def test_a_step_is_its_micro_batches_and_what_it_has_once() -> None:
    few, many = (
        counted(tiny(training={"global_batch_size": size, "micro_batch_size": 2}))
        for size in (4, 20)
    )
    assert few.micro_batch == many.micro_batch
    assert (few.micro_batches, many.micro_batches) == (2, 10)
    more = many.step.operations - few.step.operations
    assert more == 8 * few.of().operations
    assert few.layers == {"ssd": 3, "attention": 1}
    assert few.of().operations == sum(
        few.of(direction=d).operations for d in ("forward", "backward")
    )


def test_gradients_that_reach_autograd_are_added_together() -> None:
    counts = counted(tiny(training={"dtype": "bf16"}))
    # the embedding; norms, residual weights, A_log and dt_bias
    expected = {"add_": 1, "_foreach_copy_": 1, "_foreach_add_": 1}
    assert counts.of("", HOOKS).kinds == expected
    # every weight of a product: two halves, in and out, of each layer; the head's two, of a block
    products = counts.of(direction="backward").kinds
    assert products["addmm"] == 4 * 4
    assert products["addcmul_"] == 1


@pytest.mark.parametrize(
    ("parallel", "rank", "layers"),
    [
        ({"tensor": 2}, 0, {"ssd": 3, "attention": 1}),
        ({"tensor": 2, "recompute": "full"}, 1, {"ssd": 3, "attention": 1}),
        ({"pipeline": 2}, 0, {"ssd": 2, "attention": 0}),
        ({"pipeline": 2}, 1, {"ssd": 1, "attention": 1}),
        ({"pipeline": 2, "virtual_pipeline": 2}, 1, {"ssd": 1, "attention": 1}),
        ({"context": 2, "zero_stage": 2}, 0, {"ssd": 3, "attention": 1}),
        ({"zero_stage": 0}, 0, {"ssd": 3, "attention": 1}),
    ],
    ids=str,
)
def test_layouts(parallel: dict[str, Any], rank: int, layers: dict[str, int]) -> None:
    model = {"attn_layer_offset": 3}
    counts = counted(tiny(parallel=parallel, model=model), rank)
    assert counts.layers == layers
    assert bool(counts.head_blocks) == (rank == 1 or "pipeline" not in parallel)
    collectives = {k for k in counts.of().kinds if "gather" in k or "send" in k or "all" in k}
    assert bool(collectives) == (counts.ranks > 1)
    for layer, number in layers.items():
        assert counts.of(layer).operations % max(1, number) == 0
        forward = counts.of(layer, direction="forward").operations
        backward = counts.of(layer, direction="backward").operations
        assert min(forward, backward) > 0 or number == 0


@pytest.mark.parametrize(
    ("parallel", "rank"),
    [({}, 0), ({"recompute": "full"}, 0), ({"recompute": "selective"}, 0),
     ({"pipeline": 2}, 0), ({"context": 2}, 0)],
    ids=str,
)  # fmt: skip
def test_documents_and_rotations_are_made_once_a_micro_batch(
    parallel: dict[str, Any], rank: int
) -> None:
    """Not once a layer, nor again where layers are recomputed; no gradients are added between."""
    counts = counted(tiny(parallel=parallel, training={"dtype": "bf16"}), rank)
    made = counts.of("", "positions").kinds
    assert made["bucketize"] == made["arange"] == 1
    context = "context" in parallel  # reads rotations and states of its own
    for layer in ("ssd", "attention"):
        within = counts.of(layer).kinds
        if not context:
            assert not within.keys() & {
                "bucketize",
                "arange",
                "searchsorted",
                "index",
                "cat",
                "add",
            }
        assert "bucketize" not in within


# -- the command -----------------------------------------------------------------------------------


def test_the_command_prints_tables_and_json(tmp_path: Path) -> None:
    path = write_config(tmp_path, NOWHERE)
    (ended,) = run_command("kernels", "launches", path)
    assert ended.code == 0, ended.output
    for words in ("SSD layer", "gradient hooks", "bytes a logit beside the products", "update:"):
        assert words in ended.output
    (ended,) = run_command(
        "kernels", "launches", path, "--json", "--model.tie_word_embeddings", "true"
    )
    found = json.loads(ended.output.splitlines()[-1])
    summary = found["summary"]
    assert summary["micro_batch_operations"] == sum(p["operations"] for p in found["micro_batch"])
    assert summary["update_waits"] == next(
        part["waits"] for part in found["once"] if part["part"] == "update"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parallel.zero_stage", "3"], "parallel.zero_stage = 3: DeepSpeed moves the weights"),
        (["--parallel.offload", "optimizer"], "parallel.offload = 'optimizer': the optimizer's"),
        (["--update", "--parallel.zero_stage", "2"], "--update accepts the counts of a file"),
        (["--model.hiden_size", "3"], "hiden_size"),
    ],
)
def test_what_cannot_be_counted_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    (ended,) = run_command("kernels", "launches", write_config(tmp_path, NOWHERE), *words)
    assert ended.code == 2
    assert message in paragraph(ended.output)


def test_a_layer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = write_config(
        tmp_path, NOWHERE, model={"attn_layer_period": 100, "attn_layer_offset": 99}
    )
    (ended,) = run_command("kernels", "launches", path, "--layer", "attention")
    assert ended.code == 2
    assert "--layer attention: this rank has no such layer" in paragraph(ended.output)


def test_an_unknown_layer_is_refused() -> None:
    found = CliRunner().invoke(app, ["kernels", "launches", "c.toml", "--layer", "conv"])
    assert found.exit_code == 2
    assert "--layer" in found.output


def test_the_host_makes_calls_and_takes_time(tmp_path: Path) -> None:
    alone = host_cost.small(tiny().model, "attention")
    (cost,) = run_ranks(1, host_cost.measure, alone, "bf16", 4, tmp_path)
    assert 200 < cost.python_calls < 20_000
    assert 0 < cost.forward_microseconds < cost.microseconds


def test_without_a_compiler_the_host_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc")
    words = (tiny().model.model_dump_json(), "ssd", "bf16", "4", str(tmp_path))
    assert host_cost.main(*words) == 1
    assert "/nowhere/cc cannot make a library" in capsys.readouterr().err


def test_of_a_graph_the_host_launches_a_few_operations() -> None:
    """Copies of its seven inputs, the graph, and a copy of what it returns."""
    (counts,) = run_ranks(1, partial(count, graphs=True), load_config(CONFIGS / "320m.toml"))
    schedule = counts.of("", "schedule")
    assert schedule.kinds == {"copy_": 7, "graph": 1, "clone": 1}
    assert counts.of().operations <= 12
    assert counts.of().waits == 0


def test_layouts_without_graphs_are_not_counted_so() -> None:
    config = load_config(CONFIGS / "320m.toml", ["--parallel.zero_stage=2"])
    with pytest.raises(ConfigError, match=r"--graphs: .*parallel\.zero_stage=2"):
        count(config, graphs=True)
