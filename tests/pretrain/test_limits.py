"""Numbers that no machine could serve: refused at once, in one sentence, by what is wrong."""

import os
import re
import resource
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from typer.testing import CliRunner

from parallel.config import ModelConfig, ParallelConfig, some_divisors
from parallel.launch import Launch
from parallel.split import layer_chunks
from pretrain import memory
from pretrain.cli import app
from pretrain.config import Config, ConfigError, load_config, parse_config
from tests.pretrain.command import paragraph, run_command, write_config

HUGE = [10**6 + 1, 10**9, 2 * 10**9, 10**18, 10**21, 10**300, 16**5000, -(10**9)]
FLOATS = [1e300, -1e300, 1e-300, float("inf"), float("nan")]
BASE: dict[str, Any] = {"data": {"train": "t", "validation": "v"}}


def numbers(section: type[BaseModel]) -> Iterator[str]:
    for name, field in section.model_fields.items():
        kinds = {field.annotation, *typing.get_args(field.annotation)}
        if kinds & {int, float}:
            yield name


FIELDS = [
    (name, number)
    for name, field in Config.model_fields.items()
    for number in numbers(typing.cast(type[BaseModel], field.annotation))
]


def refusal(tree: dict[str, Any]) -> str | None:
    """The error, which is short and made in no time, or None for a configuration that is valid."""
    begin = time.perf_counter()
    try:
        config = parse_config(tree)
        config.data_parallel(config.parallel.tensor * config.parallel.pipeline)
        message = None
    except ConfigError as error:
        message = str(error)
    assert time.perf_counter() - begin < 1
    assert "\n" not in (message or "")
    assert len(message or "") < 3000
    return message


def blend(sources: int, stages: int, **sections: Any) -> dict[str, Any]:
    """A configuration whose sources are read in turns."""
    names = [f"s{n}" for n in range(sources)]
    data = {
        "sources": [{"name": name, "path": f"/{name}"} for name in names],
        "stages": [
            {"from_tokens": n * 10**9, "weights": {names[n % sources]: 1.0}}
            for n in range(1, stages + 1)
        ],
    }
    training = {"tokens": 10**13, "eval_every": 0} | sections.pop("training", {})
    return {"data": data, "training": training, **sections}


def test_many_sources_and_stages_are_refused_by_name() -> None:
    assert refusal(blend(256, 256)) is None
    message = refusal(blend(257, 8_000))
    assert message is not None
    for field in ("data.sources", "data.stages"):
        assert re.search(rf"{field}=.*at most 256", message)


def test_nodes_are_counted_at_once_however_many_there_are_and_stages() -> None:
    config = parse_config(blend(256, 256, training={"global_batch_size": 1024}))
    begin = time.perf_counter()
    assert config.usable_nodes(2**17, 4) == 64
    with pytest.raises(ConfigError, match=r"up to 131072.* 131072 nodes: "):
        config.usable_nodes(2**17, 7)
    assert time.perf_counter() - begin < 2


@pytest.mark.parametrize("parallel", [{}, {"pipeline": 2, "virtual_pipeline": 2}, {"tensor": 2}])
def test_usable_nodes_are_those_that_data_parallel_takes(parallel: dict[str, int]) -> None:
    tree = blend(2, 2, parallel=parallel, training={"global_batch_size": 48})
    for batch, micro in [(0, 0), (40, 2), (30, 15), (7, 2)]:
        tree["data"]["stages"][1] |= {"global_batch_size": batch, "micro_batch_size": micro}
        config = parse_config(tree)
        for tasks in (1, 2, 3):
            taken = [nodes for nodes in range(1, 60) if takes(config, nodes * tasks)]
            for nodes in (1, 5, 24, 59):
                expected = [n for n in taken if n <= nodes]
                if expected:
                    assert config.usable_nodes(nodes, tasks) == expected[-1]
                else:
                    with pytest.raises(ConfigError, match=f"{nodes} nodes: "):
                        config.usable_nodes(nodes, tasks)


def takes(config: Config, world_size: int) -> bool:
    try:
        config.data_parallel(world_size)
    except ConfigError:
        return False
    return True


def test_a_copied_configuration_has_phases_of_its_own() -> None:
    config = parse_config(BASE)
    assert config.phases is config.phases
    training = config.training.model_copy(update={"global_batch_size": 32})
    changed = config.model_copy(update={"training": training})
    assert [c.phases[0].global_batch_size for c in (config, changed)] == [8, 32]
    assert parse_config(config.model_dump()) == config == config.model_copy()


@pytest.mark.parametrize(("section", "field"), FIELDS, ids=str)
def test_every_number_has_bounds(section: str, field: str) -> None:
    for value in [*HUGE, *FLOATS]:
        base = BASE.get(section, {})
        refused = refusal(BASE | {section: base | {field: value}})
        assert refused or abs(value) <= 10**18, value
        assert refused or value > 0


def test_sizes_that_fit_their_bounds_are_checked_in_no_time() -> None:
    heads = {"num_heads": 65_536, "num_kv_heads": 65_535}
    assert "use one of [2, 4," in (refusal(BASE | {"model": heads}) or "")
    batch = {"global_batch_size": 1_048_575, "micro_batch_size": 1_048_574}
    assert "use one of [" in (refusal(BASE | {"training": batch}) or "")
    assert len(some_divisors(3 * 2**25, 1000)) == 16
    begin = time.perf_counter()
    chunks = layer_chunks(ModelConfig(num_layers=512), ParallelConfig(pipeline=8), 4096)
    assert sum(map(len, chunks)) == 512
    assert time.perf_counter() - begin < 8


def test_run_longer_than_its_counters_is_refused() -> None:
    training = {"steps": 10**12, "global_batch_size": 1_048_576}
    assert "make it shorter" in (refusal(BASE | {"training": training}) or "")
    assert refusal(BASE | {"training": {"steps": 10**12}}) is None


@pytest.mark.parametrize(
    "words",
    [
        "--training.steps=" + "9" * 5000,
        "--training.steps=0x" + "f" * 9000,
        "--training.steps=" + "[" * 5000,
        "--model.rope_scaling={rope_type=[1], factor=2.0}",
        "--model.rope_scaling={rope_type='linear', factor=[2.0]}",
        "--model.rope_scaling={rope_type='linear', factor=1979-05-27}",
        "--model.rope_scaling={rope_type='linear', factor={a=1}}",
        "--model.rope_scaling={rope_type='linear', factor=true}",
        "--model.rope_scaling={rope_type='linear', factor=inf}",
        "--model.rope_scaling={rope_type='linear', factor=1e300}",
        "--model.rope_scaling={rope_type=1979-05-27, factor=2.0}",
        "--model.rope_scaling={rope_type='yarn', factor=2.0, "
        "original_max_position_embeddings=64, beta_fast=[1]}",
        "--model.rope_scaling={rope_type='yarn', factor=2.0, "
        "original_max_position_embeddings=64, truncate=1}",
        "--model.rope_scaling={rope_type='yarn', factor=2.0, "
        "original_max_position_embeddings=64.5}",
        "--model.num_layers=1979-05-27",
        "--optimizer.betas=[1979-05-27, 1]",
    ],
    ids=lambda words: words[:70],
)
def test_values_of_other_types_are_refused_by_name(words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[data]\ntrain = "t"\nvalidation = "v"\n')
    with pytest.raises(ConfigError) as caught:
        load_config(path, [words])
    assert words.partition("=")[0][2:] in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "command",
    [
        "tokenizer train x --out y --vocab-size 2000000000",
        "prepare x --out y --tokenizer t --seq-len 1000000000000",
        "prepare x --out y --tokenizer t --workers 1000000000",
        "generate m --max-new-tokens 1000000000000",
        "generate m --temperature 1e300",
        "generate m --seed -1",
        "evaluate m --max-length 1000000000000",
        "evaluate m --cases 1000000000",
        "evaluate m --tensor 1000000000",
        "nodes c.toml --of 1000000000",
        "estimate c.toml --nodes 1000000000",
        "pretrain c.toml --dry-run --world-size 1000000000",
        "doctor --layout c.toml --nodes 1000000000",
    ],
)
def test_options_have_bounds(command: str) -> None:
    result = CliRunner().invoke(
        app, command.split(), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    )
    assert result.exit_code == 2, result.output
    assert "Invalid value for '--" in result.output


def test_without_memory_for_its_first_lines() -> None:
    """No thread for signals: one sentence."""
    import subprocess
    import sys

    script = (
        "from pretrain import __main__, stop\n"
        "def listen(): raise RuntimeError('cannot start new thread')\n"
        "stop.listen = listen\n"
        "__main__.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "pretrain", "none"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "cannot start new thread" in paragraph(done.stderr)
    assert "ulimit -v" in paragraph(done.stderr)


# -- the machine's memory ------------------------------------------------------------------------

CPU = torch.device("cpu")


def config_of(tmp_path: Path, **model: Any) -> Config:
    return parse_config(BASE | {"model": model, "logging": {"run_dir": str(tmp_path / "run")}})


def test_least_need_is_no_more_than_parameters_take(tmp_path: Path) -> None:
    config = config_of(tmp_path, vocab_size=8192)
    parameters = config.model.num_params()["total"]
    need = memory.least_need(config, 1, on_gpu=True)
    assert need.host == 0
    row = 2 * config.training.micro_batch_size * config.data.seq_len * config.model.hidden_size
    assert need.device == pytest.approx(14 * parameters + row, rel=1e-3)
    assert memory.least_need(config, 8, on_gpu=False).host < need.device


def test_job_larger_than_its_machine_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.refuse_too_large(config_of(tmp_path), Launch(0, 1, 0), CPU)
    large = config_of(tmp_path, vocab_size=2**24, hidden_size=2**16)
    with pytest.raises(ConfigError, match=r"needs [\d,.]+ GiB .* has [\d,.]+ GiB; use a smaller"):
        memory.refuse_too_large(large, Launch(0, 1, 0), CPU)
    (tmp_path / "memory.max").write_text("50000000\n")
    (tmp_path / "memory.swap.max").write_text("0\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    with pytest.raises(ConfigError, match=r"control group .* has 0\.05 GiB"):
        memory.refuse_too_large(config_of(tmp_path), Launch(0, 1, 0), CPU)


def lower_address_space() -> None:
    """Below what the imports have taken, and some megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (560 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def lower_one_rank() -> None:
    if os.environ["RANK"] == "1":
        lower_address_space()


def test_every_rank_refuses_what_one_cannot_hold(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_data)
    words = ("--model.hidden_size=2048", "--model.intermediate_size=8192")
    for end in run_command("pretrain", config, *words, ranks=2, before=lower_one_rank):
        assert end.code == 2, end.output
        assert "rank 1 within its ulimit -v" in paragraph(end.output)
    assert not (tmp_path / "run").exists()


def exhaust_a_thread() -> None:
    """Memory ends as a thread begins: what starts it waits for a sign that never comes."""
    import threading

    real = threading.Thread._set_tstate_lock  # type: ignore[attr-defined]

    def fail(thread: threading.Thread) -> None:
        if thread.name.startswith("checkpoint"):
            raise MemoryError
        real(thread)

    threading.Thread._set_tstate_lock = fail  # type: ignore[attr-defined]


def test_thread_that_cannot_begin_ends_the_run_with_a_sentence(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_data)
    (end,) = run_command("pretrain", config, before=exhaust_a_thread, kill_after=30)
    assert end.code == 1, end.output
    assert "out of memory" in paragraph(end.output)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("can't start new thread"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory"), "out of memory"),
        (OSError("libgomp.so.1: failed to map segment from shared object"), "out of memory"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (RuntimeError("Failed to init uv loop"), "ulimit -n"),
        (OSError(27, "File too large"), "ulimit -f"),
        (OSError(36, "File name too long", 300 * "a"), "use a shorter name"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_exhausted_resources_are_one_sentence(
    error: Exception, says: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert says in reported(error, capfd, monkeypatch)


@pytest.mark.parametrize(
    ("limits", "raised"),
    [((1024, 4096), 4096), ((256, 1 << 20), 1 << 16), ((64, 64), None), ((63, 63), None),
     ((1 << 17, 1 << 17), None)],
)  # fmt: skip
def test_the_limit_of_open_files_is_raised(
    limits: tuple[int, int], raised: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain import open_files

    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(open_files.resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(open_files.resource, "setrlimit", lambda _, pair: calls.append(pair))
    if limits[1] < 64:
        with pytest.raises(ConfigError, match=r"open files is 63, .*ulimit -n"):
            open_files.raise_open_files()
    else:
        open_files.raise_open_files()
    assert calls == ([] if raised is None else [(raised, limits[1])])


def test_no_file_left_for_the_modules_of_a_report(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain import cli

    error = OSError(24, "Too many open files")

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "_fail", fail)
    assert "ulimit -n" in reported(error, capfd, monkeypatch)


def reported(
    error: Exception, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> str:
    """What the command says of an error, and ends with 1."""
    import sys

    from pretrain import cli, stop

    def exit_(code: int) -> typing.NoReturn:
        raise SystemExit(code)

    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(cli.os, "_exit", exit_)
    monkeypatch.setattr(stop.os, "_exit", exit_)
    monkeypatch.setattr(cli.logging, "shutdown", lambda: None)
    monkeypatch.setattr(sys, "argv", ["transxssm"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    return paragraph(capfd.readouterr().err)
