"""The configuration: files, overrides, and errors that name the field and what would be valid."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import Config, ConfigError, dump_config, load_config, parse_config
from tests.tiny import tiny_config


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(dump_config(tiny_config(tmp_path / "data", tmp_path / "run")))
    return path


def tree(**sections: dict[str, Any]) -> dict[str, Any]:
    """Plain values of a valid configuration with some fields changed."""
    base: dict[str, Any] = {"data": {"train": "t", "validation": "v"}}
    return base | {name: base.get(name, {}) | fields for name, fields in sections.items()}


# -- reading, overriding, writing ----------------------------------------------------------------


def test_dump_and_load_give_an_equal_configuration(tmp_path: Path) -> None:
    config = parse_config(
        tree(
            model={"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "num_layers": 4},
            parallel={"pipeline": 2, "pipeline_split": [1, 3], "sequence": False},
            training={"steps": 0, "tokens": 10**13},
            optimizer={"betas": [0.9, 0.999], "eps": 1e-15},
            logging={"run_dir": 'quotes " and \\ and ünïcode'},
        )
    )
    path = tmp_path / "dumped.toml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@settings(deadline=None)
@given(
    lr=st.floats(min_value=1e-300, max_value=100),
    weight_decay=st.floats(min_value=0, max_value=100),
    steps=st.integers(1, 10**12),
    seed=st.integers(0, 2**62),
    spelling=st.sampled_from(["{}={}", "{} {}"]),
)
def test_numbers_on_the_command_line_arrive_unchanged(
    lr: float, weight_decay: float, steps: int, seed: int, spelling: str, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "numbers.toml"
    path.write_text('[data]\ntrain = "t"\nvalidation = "v"\n')
    values = {
        "--optimizer.lr": lr,
        "--optimizer.weight_decay": weight_decay,
        "--training.steps": steps,
        "--data.seed": seed,
    }
    words = " ".join(spelling.format(name, value) for name, value in values.items()).split(" ")
    config = load_config(path, words)
    assert config.optimizer.lr == lr
    assert config.optimizer.weight_decay == weight_decay
    assert config.training.steps == steps
    assert config.data.seed == seed
    path.write_text(dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("words", "section", "field", "value"),
    [
        (["--training.steps", "7"], "training", "steps", 7),
        (["--training.steps=7"], "training", "steps", 7),
        (["--training.steps=7", "--training.steps=8"], "training", "steps", 8),
        (["--optimizer.lr", "1"], "optimizer", "lr", 1.0),
        (["--optimizer.betas", "[0.8, 0.9]"], "optimizer", "betas", [0.8, 0.9]),
        (["--training.deterministic", "true"], "training", "deterministic", True),
        (["--training.dtype", "bf16"], "training", "dtype", "bf16"),
        (["--training.dtype", '"bf16"'], "training", "dtype", "bf16"),
        (["--parallel.sequence", "auto"], "parallel", "sequence", "auto"),
        (["--parallel.sequence=false"], "parallel", "sequence", False),
        (["--data.train", "123"], "data", "train", "123"),
        (["--data.train=a=b c"], "data", "train", "a=b c"),
        (["--checkpoint.dir="], "checkpoint", "dir", ""),
        (["--checkpoint.resume", "none"], "checkpoint", "resume", "none"),
        (["--model.rope_scaling", '{rope_type="linear", factor=2.0}'], "model", "rope_scaling",
         {"rope_type": "linear", "factor": 2.0}),
    ],
    ids=str,
)  # fmt: skip
def test_override(file: Path, words: list[str], section: str, field: str, value: Any) -> None:
    assert getattr(getattr(load_config(file, words), section), field) == value


def test_override_wins_over_the_file_and_leaves_the_rest(file: Path) -> None:
    before, after = load_config(file), load_config(file, ["--optimizer.lr=0.5"])
    assert before.optimizer.lr != 0.5
    assert after == before.model_copy(
        update={"optimizer": before.optimizer.model_copy(update={"lr": 0.5})}
    )


def test_override_of_a_section_that_the_file_lacks(tmp_path: Path) -> None:
    path = tmp_path / "short.toml"
    path.write_text('data = {train = "t", validation = "v"}\n')
    assert load_config(path, ["--parallel.zero_stage=3"]).parallel.zero_stage == 3


def test_tokens_set_the_number_of_steps() -> None:
    config = parse_config(
        tree(training={"steps": 0, "tokens": 8 * 1024 * 10 + 1}, data={"seq_len": 1024})
    )
    assert (config.phases[0].tokens_per_step, config.total_steps) == (8 * 1024, 11)


def test_tokens_alone_replace_the_default_number_of_steps(tmp_path: Path) -> None:
    config = parse_config(tree(training={"tokens": 8 * 1024 * 10}))
    assert (config.training.steps, config.total_steps) == (0, 10)
    path = tmp_path / "dumped.toml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


# -- errors --------------------------------------------------------------------------------------


def error_of(path: Path, *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(words))
    message = str(caught.value)
    assert "\n" not in message  # one paragraph
    return message


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--training.stepz=1"], "unknown field training.stepz; the nearest valid name is "
                                 "training.steps"),
        (["--modle.vocab_size=1"], "unknown field modle; the nearest valid name is model"),
        (["--model.n_heads=1"], "the nearest valid name is model.num_heads"),
        (["--optimizer.learning_rate=1"], "unknown field optimizer.learning_rate"),
        (["--training.steps=many"], "training.steps='many': input should be a valid integer"),
        (["--training.steps=1.5"], "training.steps=1.5: input should be a valid integer"),
        (["--training.steps=true"], "training.steps=True: input should be a valid integer"),
        (["--training.steps="], "training.steps='': input should be a valid integer"),
        (["--optimizer.lr=inf"], "optimizer.lr=inf: input should be a finite number"),
        (["--optimizer.lr=0"], "optimizer.lr=0: input should be greater than 0"),
        (["--training.dtype=fp16"], "training.dtype='fp16': input should be 'bf16' or 'fp32'"),
        (["--parallel.sequence=x"], "parallel.sequence='x': input should be a valid boolean"),
        (["--parallel.zero_stage=4"], "parallel.zero_stage=4: input should be 0, 1, 2 or 3"),
        (["--training.steps"], "the override --training.steps lacks a value"),
        (["--training.steps", "--training.seed=3"], "the override --training.steps lacks a value"),
        (["--steps=3"], "unexpected argument '--steps=3'"),
        (["--steps=3"], "did you mean --training.steps"),
        (["--training.lr=1"], "unknown field training.lr; the nearest valid name is optimizer.lr"),
        (["--optimizer.learning_rate=1"], "the nearest valid name is optimizer.lr"),
        (["--training.learning-rate=1"], "the nearest valid name is optimizer.lr"),
        (["--training.grad_clip=1"], "the nearest valid name is optimizer.clip_grad_norm"),
        (
            ["--training.batch_size=1"],
            "the nearest valid name is training.global_batch_size or training.micro_batch_size",
        ),
        (["--optimizer.seed=1"], "the nearest valid name is data.seed or training.seed"),
        (["--model.zero-stage=1"], "the nearest valid name is parallel.zero_stage"),
        (["--train.lr=1"], "unknown field train.lr; the nearest valid name is optimizer.lr"),
        (["--training.warmup_fractions=1"], "the nearest valid name is optimizer.warmup_fraction"),
        (["--training.steps=1e400"], "training.steps=inf: input should be a valid integer"),
        (["--training.steps=1e9.5"], "training.steps='1e9.5': input should be a valid integer"),
        (["--logging.tensorboard=maybe"], "logging.tensorboard='maybe': input should be a valid b"),
        (["--optimizer.betas=0.9"], "optimizer.betas=[0.9]: list should have at least 2"),
        (["training.steps=3"], "unexpected argument 'training.steps=3'"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_override_is_named(file: Path, words: list[str], found: str) -> None:
    assert found in error_of(file, *words)


TYPED = [
    ("--logging.tensorboard False", False), ("--logging.tensorboard yes", True),
    ("--logging.tensorboard 0", False), ("--logging.tensorboard=OFF", False),
    ("--training.deterministic", True), ("--training.deterministic --training.steps=5", True),
    ("--training.tokens 1e9", 10**9), ("--training.tokens 2.5E6", 2_500_000),
    ("--training.tokens 9007199254740993", 2**53 + 1), ("--training.steps 1,000", 1000),
    ("--training.steps 1_000", 1000), ("--training.seed 007", 7), ("--training.steps 5.0", 5),
    ("--training.global-batch-size 16", 16), ("--optimizer.lr .5", 0.5), ("--optimizer.lr 1", 1.0),
    ("--optimizer.lr 3E-4", 3e-4), ("--optimizer.betas 0.8,0.95", [0.8, 0.95]),
    ("--optimizer.betas (0.8,0.95)", [0.8, 0.95]), ("--logging.profile_steps 3", [3]),
    ("--parallel.sequence False", False), ("--parallel.sequence auto", "auto"),
    ("--training.dtype FP32", "fp32"), ("--training.dtype 'bf16'", "bf16"),
    ("--logging.profile_steps 3,4", [3, 4]), ("--parallel.pipeline_split balanced", "balanced"),
    ('--model.rope_scaling {"rope_type":"linear","factor":2.0}',
     {"rope_type": "linear", "factor": 2.0}),
    ("--data.train 1e9", "1e9"), ("--logging.run_dir True", "True"),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "value"), TYPED, ids=str)
def test_values_are_taken_as_a_person_types_them(typed: str, value: object, file: Path) -> None:
    words = typed.split()
    section, field = words[0].split("=")[0].removeprefix("--").split(".")
    config = load_config(file, words)
    found = getattr(getattr(config, section), field.replace("-", "_"))
    assert (found, type(found)) == (value, type(value))


def test_length_on_the_command_line_replaces_that_of_the_file(file: Path) -> None:
    steps = load_config(file, ["--training.steps=50", "--training.tokens=0"]).training
    assert (steps.steps, steps.tokens) == (50, 0)
    assert load_config(file).training.steps
    tokens = load_config(file, ["--training.tokens", "1e6"]).training
    assert (tokens.steps, tokens.tokens) == (0, 10**6)
    both = error_of(file, "--training.tokens=1e6", "--training.steps=3")
    assert "set exactly one of them" in both


def test_every_mistake_is_reported_at_once(file: Path) -> None:
    message = error_of(file, "--training.stepz=1", "--optimizer.lr=fast")
    assert "training.stepz" in message
    assert "optimizer.lr='fast'" in message


@pytest.mark.parametrize(
    "field", ["checkpoint.dir", "logging.run_dir", "logging.prometheus_file", "data.cache_dir"]
)
def test_run_is_written_to_no_url(field: str, file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file, [f"--{field}", "s3://user:S3cr3t@bucket/x"])
    assert f"{field} is a URL (s3://...)" in str(caught.value)
    assert "S3cr3t" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    assert "nowhere.toml: No such file" in error_of(tmp_path / "nowhere.toml")


def test_folder_instead_of_a_file(tmp_path: Path) -> None:
    assert "is a folder" in error_of(tmp_path)


def test_paths_mean_what_they_mean_in_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the file and on the command line, wherever a path is configured."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LAB", "/lab")
    monkeypatch.delenv("UNSET", raising=False)
    file = tmp_path / "config.toml"
    file.write_text(
        '[data]\nsources = [{path = "$LAB/web", name = "web"}]\n'
        'validation = {a = "~/v", b = "${LAB}/v"}\ncache_dir = "$UNSET/cache"\n'
        '[checkpoint]\ndir = "~/saves"\nload_weights_only = "$LAB/model"\n'
        '[logging]\nprometheus_file = "~/x.prom"\n'
    )
    config = load_config(file, ["--logging.run_dir", "~/runs/$LAB"])
    assert config.logging.run_dir == f"{tmp_path}/runs//lab"
    assert config.data.sources[0].path == "/lab/web"
    assert config.data.validation == {"a": f"{tmp_path}/v", "b": "/lab/v"}
    assert config.checkpoint_dir == tmp_path / "saves"
    assert config.checkpoint.load_weights_only == "/lab/model"
    assert config.logging.prometheus_file == f"{tmp_path}/x.prom"
    assert config.data.cache_dir == "$UNSET/cache"  # each node has its own
    copy = tmp_path / "copy.toml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


def test_variable_that_is_not_set_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNSET", raising=False)
    for field in ("logging.run_dir", "data.train", "data.validation", "checkpoint.resume"):
        with pytest.raises(
            ConfigError, match=rf"{field}='\$UNSET/x': the variable UNSET is not set"
        ):
            load_config(file, [f"--{field}=$UNSET/x"])


def test_file_that_has_a_dollar_sign_in_its_name_is_meant_itself(
    file: Path, tmp_path: Path
) -> None:
    (tmp_path / "a$HOME").mkdir()
    named = f"{tmp_path}/a$HOME"
    assert load_config(file, [f"--data.train={named}"]).data.train == named
    secret = "s3://key:a$HOME@host/x"
    assert load_config(file, [f"--data.train={secret}"]).data.train == secret


def test_file_with_a_byte_order_mark_is_read(file: Path) -> None:
    config = load_config(file)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_config(file) == config


@pytest.mark.parametrize("content", [b"[model\nvocab_size = 1", b"a = 1\na = 2", b"\xff\xfe"])
def test_file_that_is_not_toml(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    assert "broken.toml is not valid TOML: " in error_of(path)


def test_section_that_is_a_value(tmp_path: Path) -> None:
    path = tmp_path / "flat.toml"
    path.write_text('data = {train = "t", validation = "v"}\ntraining = 3\n')
    assert "training" in error_of(path)
    assert f"{path}: invalid configuration: " in error_of(path)
    assert "write it as [training]" in error_of(path, "--training.steps=3")


def test_missing_data(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("")
    assert "data is missing" in error_of(path)
    assert "data.train is missing; set it in the file or with --data.train" in error_of(
        path, "--data.seq_len=64"
    )


CROSS_FIELD: list[tuple[dict[str, dict[str, Any]], list[str]]] = [
    ({"model": {"num_kv_heads": 3}}, ["model.num_kv_heads=3", "num_heads=4", "[1, 2, 4]"]),
    ({"model": {"ssd_groups": 3}}, ["model.ssd_groups=3", "num_heads=4", "[1, 2, 4]"]),
    ({"model": {"head_dim": 63}}, ["model.head_dim=63", "even"]),
    ({"model": {"state_dim": 63}}, ["model.state_dim=63", "even"]),
    ({"model": {"chunk_size": 100}}, ["model.chunk_size=100", "64, 128 or 256"]),
    ({"optimizer": {"betas": [0.9, 1.0]}}, ["optimizer.betas=[0.9, 1.0]", "[0, 1)"]),
    ({"optimizer": {"betas": [0.9]}}, ["optimizer.betas=[0.9]", "at least 2"]),
    ({"optimizer": {"schedule": "wsd", "warmup_fraction": 0.5, "decay_fraction": 0.6}},
     ["optimizer.warmup_fraction=0.5", "optimizer.decay_fraction=0.6", "at most 1"]),
    ({"training": {"steps": 0}}, ["training.steps=0", "training.tokens=0", "exactly one"]),
    ({"training": {"steps": 5, "tokens": 5}}, ["training.steps=5", "training.tokens=5"]),
    ({"training": {"global_batch_size": 6, "micro_batch_size": 4}},
     ["training.micro_batch_size=4", "training.global_batch_size=6", "[1, 2, 3, 6]"]),
    ({"data": {"validation": ""}}, ["training.eval_every=50", "data.validation", "eval_every=0"]),
    ({"data": {"seq_len": 8192}}, ["data.seq_len=8192", "model.max_position_embeddings=4096"]),
    ({"parallel": {"tensor": 3}}, ["parallel.tensor=3", "model.num_heads=4", "[1, 2, 4]"]),
    ({"parallel": {"tensor": 2}, "model": {"num_kv_heads": 1}},
     ["parallel.tensor=2", "model.num_kv_heads=1", "[1]"]),
    ({"parallel": {"tensor": 2}, "model": {"ssd_groups": 1}},
     ["parallel.tensor=2", "model.ssd_groups=1", "[1]"]),
    ({"parallel": {"tensor": 2}, "model": {"intermediate_size": 511}},
     ["parallel.tensor=2", "model.intermediate_size=511", "[1]"]),
    ({"parallel": {"pipeline": 9}}, ["parallel.pipeline=9", "model.num_layers=8", "at most 8"]),
    ({"parallel": {"pipeline": 2, "zero_stage": 2}},
     ["parallel.zero_stage=2", "parallel.pipeline=2", "parallel.zero_stage=1"]),
    ({"parallel": {"pipeline": 2, "zero_stage": 3}}, ["parallel.zero_stage=3"]),
    ({"parallel": {"pipeline": 2, "pipeline_split": [3, 4]}},
     ["parallel.pipeline_split=[3, 4]", "model.num_layers=8", "balanced"]),
    ({"parallel": {"pipeline": 2, "pipeline_split": [8]}}, ["parallel.pipeline_split=[8]"]),
    ({"parallel": {"pipeline": 2, "pipeline_split": [8, 0]}}, ["parallel.pipeline_split=[8, 0]"]),
    ({"parallel": {"pipeline_split": []}}, ["parallel.pipeline_split=[]"]),
    ({"parallel": {"tensor": 2}, "data": {"seq_len": 1023}, "training": {"micro_batch_size": 1}},
     ["training.micro_batch_size × data.seq_len / parallel.context = 1023", "parallel.tensor=2",
      "parallel.sequence=false"]),
    ({"parallel": {"context": 3}}, ["parallel.context=3", "data.seq_len=1024", "[1, 2, 4, 8"]),
    ({"parallel": {"context": 2}, "model": {"ssd_conv_width": 4}},
     ["parallel.context=2", "model.ssd_conv_width=4", "model.ssd_conv_width=0"]),
]  # fmt: skip


@pytest.mark.parametrize(("sections", "words"), CROSS_FIELD, ids=lambda v: str(v)[:70])
def test_fields_that_do_not_go_together(
    sections: dict[str, dict[str, Any]], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree(**sections))
    for word in words:
        assert word in str(caught.value)


def test_the_alternative_that_an_error_names_is_valid() -> None:
    for tensor in (1, 2, 4):
        assert parse_config(tree(parallel={"tensor": tensor})).parallel.tensor == tensor
    for chunk_size in (0, 64, 128, 256):
        parse_config(tree(model={"chunk_size": chunk_size}))
    parse_config(tree(parallel={"tensor": 2, "sequence": False}, data={"seq_len": 1023},
                      training={"micro_batch_size": 1}))  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "world_size", "words"),
    [
        ({"tensor": 2, "pipeline": 2}, 6,
         ["parallel.tensor=2", "parallel.pipeline=2", "multiple of 4"]),
        ({}, 3, ["training.global_batch_size=8", "data parallel 3 = 12", "use 12"]),
        ({}, 4, ["data parallel 4 = 16", "use 16"]),
    ],
)  # fmt: skip
def test_processes_that_the_layout_does_not_fit(
    fields: dict[str, Any], world_size: int, words: list[str]
) -> None:
    config: Config = parse_config(tree(parallel=fields))
    with pytest.raises(ConfigError) as caught:
        config.data_parallel(world_size)
    for word in words:
        assert word in str(caught.value)


def test_data_parallel_is_what_the_model_ranks_leave() -> None:
    config = parse_config(tree(parallel={"tensor": 2, "pipeline": 2}))
    assert [config.data_parallel(n) for n in (4, 8)] == [1, 2]
