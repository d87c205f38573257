"""Estimates beside what is built: parameters, memory, traffic; layouts that do not fit; search."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ranks import run_ranks
from parallel.config import ModelConfig, ParallelConfig
from parallel.flops import head_flops, layer_flops
from parallel.footprint import chunks_in_flight
from parallel.roofline import StepTime, bubble_share, expected_time
from pretrain.config import Config, ConfigError, load_config, parse_config
from pretrain.estimate import (
    GIB,
    Job,
    as_plain,
    best_first,
    estimate,
    layouts,
    one_replica,
    parse_memory,
    workload,
)
from tests.pretrain.command import run_command

CONFIGS = Path(__file__).parents[2] / "configs"
JOB = Job(nodes=2, gpus_per_node=8, gpu_memory=80 * GIB, gpu="h100")


def config_of(parallel: dict[str, Any], **model: Any) -> Config:
    fields = {"num_layers": 8, "num_kv_heads": 2, "ssd_groups": 2, "attn_layer_period": 4}
    return parse_config(
        {
            "model": fields | {"attn_layer_offset": 3} | model,
            "parallel": parallel,
            "data": {"train": "t", "validation": "v", "seq_len": 512},
            "training": {"global_batch_size": 64, "micro_batch_size": 2},
        }
    )


TRACED = {
    "tensor": {"tensor": 2},
    "tensor-no-sequence": {"tensor": 2, "sequence": False},
    "tensor-recompute": {"tensor": 2, "recompute": "full"},
    "pipeline": {"pipeline": 4},
    "interleaved": {"pipeline": 2, "virtual_pipeline": 2, "tensor": 2},
    "heads-exchanged": {"context": 4},
    "ring": {"tensor": 2, "context": 4},
    "all": {"tensor": 2, "context": 2, "pipeline": 2},
}


def traced(config: Config, world_size: int, rank: int) -> tuple[int, dict[tuple[str, str], float]]:
    """Parameters of a rank, and the bytes that its collectives send for one micro-batch."""
    from parallel.compat import prepare_host
    from pretrain.dry_run import trace

    prepare_host()
    built, seen = trace(config, world_size, rank)
    sizes = {"tensor": config.parallel.tensor, "context": config.parallel.context}
    share = {  # of what is given to a collective of g ranks, by rank
        "allgather": lambda g: g - 1,
        "reduce_scatter": lambda g: (g - 1) / g,
        "allreduce": lambda g: 2 * (g - 1) / g,
        "alltoall": lambda g: (g - 1) / g,
        "send": lambda g: 1,
        "recv": lambda g: 0,
    }
    sent = {
        (axis, kind): size * share[kind](sizes[axis]) for (axis, kind), size in seen.bytes.items()
    }
    return sum(p.numel() for _, p in built.named_parameters()), sent


@pytest.mark.parametrize("name", TRACED)
def test_traffic_and_parameters_are_those_of_the_real_code(name: str) -> None:
    config = config_of(TRACED[name])
    result = estimate(config, JOB)
    stages = as_plain(result, JOB)["stages"]
    for stage in (0, config.parallel.pipeline - 1):
        rank = stage * JOB.world_size // config.parallel.pipeline
        numel, sent = run_ranks(1, traced, config, JOB.world_size, rank)[0]
        assert stages[stage]["memory"]["weights"] == 2 * numel
        for axis in ("tensor", "context"):
            found = sum(size for (group, _), size in sent.items() if group == axis)
            predicted = stages[stage]["traffic"][axis] / result.work.micro_batches
            assert predicted == pytest.approx(found, rel=0.02), (stage, axis, sent)


def test_dry_run_of_1024_ranks(tmp_path: Path) -> None:
    end = run_command(
        "pretrain", CONFIGS / "7b.toml", "--dry-run", "--world-size", "1024", "--rank", "777",
        "--parallel.context", "2",
    )[0]  # fmt: skip
    assert end.code == 0, end.output
    assert "rank 777 of 1024, node 97: tensor 1 of 8, context 1 of 2, data 48 of 64" in end.output
    assert "tensor group: 776, 777, 778, 779" in end.output
    assert "context group: 769, 777" in end.output
    assert "[4096, 1728]" in end.output
    assert not (tmp_path / "runs").exists()


def test_dry_run_refuses_what_a_job_would() -> None:
    for words, found in (
        (["--world-size", "12"], "does not divide the 12 processes"),
        (["--world-size", "16", "--rank", "16"], "--rank 16 is none of --world-size 16"),
    ):
        end = run_command("pretrain", CONFIGS / "7b.toml", "--dry-run", *words)[0]
        assert end.code == 2
        assert found in end.output


def test_what_does_not_fit_is_refused_with_the_stage_and_the_reason() -> None:
    words = (CONFIGS / "7b.toml", "--nodes", "1", "--gpu-memory", "4GiB")
    end = run_command("estimate", *words)[0]
    assert end.code == 2
    assert "a rank of stage 0 needs" in end.output
    assert "most of it moments (6.5 GiB)" in end.output
    assert run_command("estimate", CONFIGS / "7b.toml", "--nodes", "1")[0].code == 0


def test_json_is_one_object_that_adds_up() -> None:
    end = run_command("estimate", CONFIGS / "7b.toml", "--nodes", "2", "--json")[0]
    found = json.loads(end.output)
    assert found["parameters"]["total"] == 6_988_142_336
    assert found["sizes"] == {"tensor": 8, "context": 1, "data": 2, "pipeline": 1}
    stage = found["stages"][0]["memory"]
    assert stage["moments"] == 2 * stage["master"]
    assert found["fits"]


def test_without_a_job_it_is_of_one_replica() -> None:
    for name, sizes in (
        ("demo", {"tensor": 1, "context": 1, "data": 1, "pipeline": 1}),
        ("7b", {"tensor": 8, "context": 1, "data": 1, "pipeline": 1}),
    ):
        end = run_command("estimate", CONFIGS / f"{name}.toml", "--json")[0]
        assert json.loads(end.output)["sizes"] == sizes
    assert one_replica(config_of({"tensor": 2, "context": 4, "pipeline": 3})) == (3, 8)


def test_search_finds_layouts_that_fit_best_first() -> None:
    config = config_of({}, hidden_size=1024, intermediate_size=4096)
    job = Job(nodes=1, gpus_per_node=8, gpu_memory=2 * GIB, gpu="a100")
    found = list(layouts(config, job))
    assert len({json.dumps(as_plain(e, job)["parallel"]) for e in found}) > 30
    assert {e.peak <= job.usable for e in found} == {True, False}
    end = run_command(
        "estimate", CONFIGS / "demo.toml", "--gpus-per-node", "4", "--search", "--json"
    )
    shown = json.loads(end[0].output)
    assert len(shown) == 10
    assert shown[0]["parallel"]["pipeline"] == shown[0]["parallel"]["tensor"] == 1


def test_the_simplest_layout_of_the_fastest_is_first() -> None:
    job = Job(nodes=8, gpus_per_node=8, gpu_memory=80 * GIB, gpu="h100")
    found = [e for e in layouts(load_config(CONFIGS / "1.3b.toml"), job) if e.peak <= job.usable]
    ordered = best_first(found)
    assert sorted(map(id, ordered)) == sorted(map(id, found))
    fastest = min(e.expected.total for e in found)
    within = [e.expected.total <= fastest * 1.05 for e in ordered]
    good = within.index(False)
    assert not any(within[good:])
    first, parallel = ordered[0], ordered[0].config.parallel
    assert (parallel.tensor, parallel.context, parallel.pipeline) == (1, 1, 1)
    assert parallel.recompute == "none"
    assert first.work.data == 64
    simplest = first.complexity()
    assert all(e.complexity() >= simplest for e in ordered[:good])
    times = [e.expected.total for e in ordered[good:]]
    assert times == sorted(times)


def test_expected_time_leaves_out_what_overlaps() -> None:
    bound = StepTime(
        compute=1.0,
        bubble=0.1,
        communication={"tensor": 0.5, "context": 0.1, "data": 1.2, "pipeline": 0.2},
        update=0.01,
    )

    def parts(**parallel: Any) -> dict[str, float]:
        return dict(expected_time(bound, ParallelConfig(**parallel)).communication)

    plain = {"tensor": 0.625, "context": 0.125, "data": 1.5, "pipeline": 0.25}
    assert parts() == pytest.approx(plain)
    assert parts(tensor=2, sequence=False) == pytest.approx(plain)
    # gathered again, and scattered, beside products: one pass of two and a half
    assert parts(tensor=2)["tensor"] == pytest.approx(0.625 * 1.5 / 2.5)
    assert parts(tensor=2, recompute="full")["tensor"] == pytest.approx(0.625 * 2.5 / 3.5)
    assert parts(pipeline=2, virtual_pipeline=2)["pipeline"] == 0
    hidden = 1 / 0.48 * 2 / 3
    assert parts(zero_stage=2)["data"] == pytest.approx(1.5 - hidden)
    assert expected_time(bound, ParallelConfig()).compute == pytest.approx(1 / 0.48)


def test_the_rates_of_one_gpu_are_what_was_measured() -> None:
    """Of the three runs that the efficiency comes from, within their spread."""
    job = Job(nodes=1, gpus_per_node=1, gpu_memory=140 * GIB, gpu="h200")
    for name, seq_len, micro_batch, measured in (
        ("320m", 1024, 32, 169_000),
        ("320m", 4096, 8, 154_600),
        ("rivals/attention", 4096, 8, 141_100),
    ):
        words = [f"--data.seq_len={seq_len}", f"--training.micro_batch_size={micro_batch}"]
        words += [f"--training.global_batch_size={2 * micro_batch}"]
        words += ["--model.max_position_embeddings=4096"]
        found = estimate(load_config(CONFIGS / f"{name}.toml", words), job)
        assert found.tokens_per_second(found.expected) == pytest.approx(measured, rel=0.07)


def test_weights_are_sent_once_and_gradients_as_the_engine_does() -> None:
    config = config_of({})
    numel = estimate(config, JOB).memory[0].by_category()["weights"] // 2
    share, micro_batches = 15 / 16, 2
    for zero_stage, gradients, parameters in (
        (0, 2, 0), (1, 1, 1), (2, 2 * micro_batches, 1), (3, micro_batches, 2 * micro_batches),
    ):  # fmt: skip
        stage = as_plain(estimate(config_of({"zero_stage": zero_stage}), JOB), JOB)["stages"][0]
        wanted = share * numel * (4 * gradients + 2 * parameters)
        assert stage["traffic"]["data"] == pytest.approx(wanted, rel=1e-6), zero_stage


def test_nothing_fits() -> None:
    end = run_command("estimate", CONFIGS / "7b.toml", "--gpu-memory", "1MiB", "--search")[0]
    assert end.code == 2
    assert "no layout of this model fits 8 GPUs" in end.output


def test_a_batch_that_no_layout_shares_out_is_named() -> None:
    words = ("--nodes", "3", "--gpus-per-node", "5", "--search")
    end = run_command("estimate", CONFIGS / "demo.toml", *words)[0]
    assert end.code == 2
    assert "training.global_batch_size = 8 over 15 GPUs" in " ".join(end.output.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [("80GiB", 80 * GIB), ("80GB", 80 * 10**9), ("1.5 GiB", 3 * GIB // 2), ("1000", 1000)],
)
def test_sizes_of_memory(text: str, expected: int) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["80Gi", "much", "", "-1GiB", "0"])
def test_bad_sizes_of_memory(text: str) -> None:
    with pytest.raises(ConfigError, match="--gpu-memory"):
        parse_memory(text)


def test_attention_and_scan_by_hand() -> None:
    model = ModelConfig(ssd_groups=2, chunk_size=128)
    hidden, feed_forward = 256, 2 * 3 * 256 * 512
    projections = 2 * hidden * (2 * 256 + 2 * 2 * 64 + 4)
    scan = 2 * 2 * 64 * 64 + 4 * (2 * 64 * 64 + 4 * 64 * 64)  # chunks of 64, not of 128
    assert layer_flops(model, 0, 4096) == feed_forward + projections + scan
    halved = scan - 2 * 2 * 32 * 64 - 4 * 2 * 32 * 64
    shorter = model.model_copy(update={"chunk_size": 32})
    assert layer_flops(shorter, 0, 4096) == feed_forward + projections + halved
    assert layer_flops(model, 0, 32) == layer_flops(shorter, 0, 32)
    attention = 2 * hidden * 4 * 256 + sum(4 * 256 * keys for keys in range(1, 4097)) / 4096
    assert layer_flops(model, 7, 4096) == pytest.approx(feed_forward + attention)
    assert head_flops(model) == 2 * 256 * 8192


def test_bubble_and_chunks_in_flight() -> None:
    assert bubble_share(4, 1, 4) == 3 / 7
    assert bubble_share(4, 2, 4) == 3 / 11
    plain, interleaved = ParallelConfig(pipeline=4), ParallelConfig(pipeline=4, virtual_pipeline=2)
    assert [chunks_in_flight(plain, 8, s) for s in range(4)] == [4, 3, 2, 1]
    assert [chunks_in_flight(plain, 2, s) for s in range(4)] == [2, 2, 2, 1]
    assert [chunks_in_flight(interleaved, 8, s) for s in range(4)] == [11, 9, 7, 5]


def test_longer_sequences_and_less_recomputation_need_more() -> None:
    peaks = [
        estimate(config_of({"recompute": again}), JOB).peak
        for again in ("full", "selective", "none")
    ]
    assert peaks == sorted(peaks)
    assert len(set(peaks)) == 3
    assert workload(config_of({}), 16).micro_batches == 2
