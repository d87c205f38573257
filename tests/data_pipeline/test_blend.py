"""Blends: shares, epochs and stages, the same for every reader, from any point on."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.blend import PAGE, PERIOD, Blend, BlendOrder, Stage, interleaved
from data_pipeline.config import DataConfig
from data_pipeline.dataset import PackedDataset
from data_pipeline.errors import DataError
from data_pipeline.loader import BatchLoader, BatchSize
from data_pipeline.order import Windows, sample_indices
from data_pipeline.prepare import prepare
from data_pipeline.tokenizer import train_tokenizer
from tests.data_pipeline.conftest import SEQ_LEN
from tests.pretrain.command import read_metrics, run_command, succeed, write_config

GLOBAL = 24
SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=4)


@st.composite
def orders(draw: Any) -> BlendOrder:
    sizes = draw(SIZES)
    weight = st.lists(st.floats(0.01, 1), min_size=len(sizes), max_size=len(sizes))
    firsts = [0, *sorted(draw(st.sets(st.integers(1, 2000), max_size=2)))]
    stages = [Stage(first, tuple(draw(weight))) for first in firsts]
    tokens = [size * draw(st.integers(20, 33)) for size in sizes]
    return BlendOrder(draw(st.integers(0, 99)), sizes, tokens, stages)


@settings(deadline=None, max_examples=40)
@given(orders(), st.integers(1, 3000))
def test_every_source_is_read_whole_epoch_after_epoch(order: BlendOrder, total: int) -> None:
    sources, indices = order.locate(np.arange(total))
    for source, size in enumerate(order.sizes):
        read = indices[sources == source]
        assert order.drawn(total)[source] == read.size
        for begin in range(0, read.size, size):
            epoch = read[begin : begin + size]
            assert np.unique(epoch).size == epoch.size
            assert epoch.max() < size


@settings(deadline=None, max_examples=40)
@given(orders(), st.lists(st.integers(0, 10**12), min_size=1, max_size=9))
def test_a_sample_depends_on_its_number_alone(order: BlendOrder, counters: list[int]) -> None:
    sources, indices = order.locate(np.array(counters))
    for k, source, index in zip(counters, sources, indices, strict=True):
        alone = order.locate(np.array([k]))
        assert (int(alone[0][0]), int(alone[1][0])) == (source, index)
        before, after = order.drawn(k), order.drawn(k + 1)
        assert (after - before).tolist() == np.eye(len(order.sizes))[source].tolist()


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=5))
@settings(deadline=None, max_examples=30)
def test_any_prefix_has_the_shares(shares: list[float]) -> None:
    table = interleaved(np.array(shares))
    assert table.size == PERIOD
    counts = np.eye(len(shares))[table].cumsum(0)
    assert counts[-1].min() >= 1
    exact = counts[-1] / PERIOD * np.arange(1, PERIOD + 1)[:, None]
    assert np.abs(counts - exact).max() <= 1 + len(shares) / 2
    wanted = np.array(shares) / sum(shares)
    assert np.abs(counts[-1] / PERIOD - wanted).max() <= (len(shares) + 1) / PERIOD


def test_weights_are_of_tokens_not_samples() -> None:
    order = BlendOrder(0, [100, 100], [100 * 50, 100 * 25], [Stage(0, (1.0, 1.0))])
    drawn = order.drawn(3000)  # half-filled samples come twice as often
    assert drawn[1] / drawn[0] == pytest.approx(2, rel=1e-3)


def test_a_stage_longer_than_its_table_reads_on() -> None:
    """Every source's own samples go on where the table begins again, epoch after epoch."""
    stages = [Stage(0, (0.7, 0.3)), Stage(2 * PERIOD + 77, (0.2, 0.8))]
    order = BlendOrder(7, [30_000, 3000], [30_000, 3000], stages)
    sources, indices = order.locate(np.arange(5 * PERIOD))
    for source, size in enumerate((30_000, 3000)):
        read = indices[sources == source]
        assert read.size == order.drawn(5 * PERIOD)[source]
        expected = sample_indices(7, np.arange(read.size), size, source)
        assert np.array_equal(read, expected)
        whole = read[: read.size // size * size].reshape(-1, size)
        assert whole.size
        assert (np.sort(whole) == np.arange(size)).all()


def test_stages_take_over_where_they_begin() -> None:
    stages = [Stage(0, (1.0, 0.0)), Stage(240, (0.0, 1.0)), Stage(480, (1.0, 1.0))]
    order = BlendOrder(5, [100, 77], [100, 77], stages)
    assert order.drawn(240).tolist() == [240, 0]
    assert order.drawn(480).tolist() == [240, 240]
    assert order.drawn(680).tolist() == [340, 340]
    with pytest.raises(ValueError, match="rise"):
        BlendOrder(5, [1], [1], [Stage(0, (1.0,)), Stage(0, (1.0,))])


@pytest.fixture(scope="module")
def folders(
    corpus: Path, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Three prepared folders of one tokenizer, 3, 2 and 1 parts of the corpus."""
    texts, tmp = sorted(corpus.glob("*.txt")), tmp_path_factory.mktemp("blend")
    found = []
    for number, (begin, end) in enumerate(pairwise([0, 60, 100, 120])):
        out = tmp / str(number)
        prepare(texts[begin:end], tokenizer_file, out, SEQ_LEN, validation_fraction=0)
        found.append(out / "train")
    return found


def blend(folders: list[Path]) -> Blend:
    stages = [Stage(0, (0.5, 0.3, 0.2)), Stage(5 * GLOBAL, (0.1, 0.0, 0.9))]
    return Blend([PackedDataset(f) for f in folders], seed=3, names=["a", "b", "c"], stages=stages)


def batches(folders: list[Path], size: int, micro: int, start: int, steps: int) -> list[list[Any]]:
    """Rows of every global batch, as all data-parallel ranks read it."""
    whole: list[list[Any]] = [[] for _ in range(steps)]
    for rank in range(size):
        loader = BatchLoader(
            blend(folders), [BatchSize(0, GLOBAL, micro)],
            data_parallel_rank=rank, data_parallel_size=size, samples_consumed=start * GLOBAL,
        )  # fmt: skip
        for step in range(steps):
            rows = [row for batch in loader.next_step() for row in batch.tokens]
            whole[step].extend(rows)
        loader.close()
    return whole


@pytest.mark.parametrize(("size", "micro"), [(2, 3), (3, 8), (4, 1), (8, 3)])
def test_global_batches_are_the_same_for_any_number_of_ranks_and_from_any_step(
    size: int, micro: int, folders: list[Path]
) -> None:
    expected = batches(folders, 1, 24, 0, 14)
    for start in (0, 1, 4, 5, 9):
        found = batches(folders, size, micro, start, 14 - start)
        for rows, wanted in zip(found, expected[start:], strict=True):
            assert torch.equal(torch.stack(rows), torch.stack(wanted))


@pytest.mark.parametrize("page", [3, 5, PAGE])
def test_a_read_may_cross_pages(
    page: int, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.blend.PAGE", page)
    data = blend(folders)
    for first, end, stride in ((0, 3, 1), (2, 5, 1), (1, 17, 4), (7, 29, 1), (3, 27, 3)):
        at = np.arange(first, end, stride) + (PAGE - 6 if page == PAGE else 0)
        samples, sources = data.read(at)
        for number, sample, source in zip(at.tolist(), samples, sources.tolist(), strict=True):
            (wanted,), (index,) = data.order.locate(np.array([number]))
            assert source == wanted
            (alone,) = data.sources[source].read(np.array([index]))
            assert np.array_equal(sample.tokens, alone.tokens)
            assert np.array_equal(sample.doc_lens, alone.doc_lens)


def test_windows_are_whole_blocks_of_so_many_tokens(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the smaller of a shard's tokens and a share of the window, so long as there are enough."""
    monkeypatch.setattr("data_pipeline.blend.BLOCK_TOKENS", 4 * SEQ_LEN)
    monkeypatch.setattr("data_pipeline.blend.MIN_BLOCKS", 3)
    source = PackedDataset(folders[0])
    for tokens, windows in ((6, Windows(2, 3)), (12, Windows(4, 3)), (20, Windows(4, 5)),
                            (1, Windows(1, 2))):  # fmt: skip
        data = Blend([source], seed=3, window_tokens=tokens * SEQ_LEN)
        counters = np.arange(2 * len(source))
        assert len(source) > windows.block * windows.blocks
        expected = sample_indices(3, counters, len(source), 0, windows)
        assert np.array_equal(data.order.locate(counters)[1], expected), windows


def test_shares_count_tokens_without_padding(tokenizer_file: Path, tmp_path: Path) -> None:
    """One source's samples are full, the other's, of short documents kept apart, are not."""
    for name, text in (("full", "the state of a scan " * 600), ("half", "z" * 20)):
        (tmp_path / name).mkdir()
        for number in range(1 if name == "full" else 60):
            (tmp_path / name / f"{number}.txt").write_text(text)
        prepare([tmp_path / name], tokenizer_file, tmp_path / f"{name}-out", SEQ_LEN,
                validation_fraction=0, packing="best_fit")  # fmt: skip
    sources = [PackedDataset(tmp_path / f"{name}-out/train") for name in ("full", "half")]
    filled = [source.meta.tokens / (len(source) * SEQ_LEN) for source in sources]
    assert filled[1] < 0.8 * filled[0]
    data = Blend(sources, seed=1, names=["full", "half"], stages=[Stage(0, (0.6, 0.4))])
    samples, of = data.read(np.arange(1500))
    tokens = np.array([sample.tokens.size - sample.num_pad for sample in samples])
    share = tokens[of == 0].sum() / tokens.sum()
    assert share == pytest.approx(0.6, abs=0.01)


def test_a_share_that_rounding_changes_is_told(
    folders: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    sources = [PackedDataset(folder) for folder in folders]
    for weights, told in (((0.9, 0.09, 0.01), 0), ((1.0, 0.5, 1e-6), 1), ((1.0, 0.5, 0.0), 0)):
        caplog.clear()
        Blend(sources, seed=0, names=["a", "b", "c"], stages=[Stage(0, weights)])
        assert len(caplog.records) == told
        if told:
            assert "data.sources c: its weight asks for 6.67e-07" in caplog.text
            assert "but it gets 6." in caplog.text


def test_a_shard_is_skipped_in_every_source_that_has_it(folders: list[Path]) -> None:
    sources = [PackedDataset(folder) for folder in (folders[0], folders[1], folders[0])]
    data = Blend(sources, seed=0, names=["a", "b", "c"], stages=[Stage(0, (1.0, 1.0, 1.0))])
    fingerprint = data.fingerprint_of(str(folders[0]))
    assert data.known_fingerprint("c") == data.known_fingerprint(fingerprint) == fingerprint
    assert data.known_fingerprint("b") == data.fingerprint_of(str(folders[1])) != fingerprint
    assert data.known_fingerprint("gone") is None
    with pytest.raises(DataError, match="none of its 1 shards"):
        data.skip(fingerprint, 0)


@pytest.mark.parametrize("paths", ["d/train", "./d/train/"], ids=str)
def test_one_folder_is_not_two_sources(paths: str) -> None:
    listed = [{"name": "a", "path": "d/train"}, {"name": "b", "path": paths}]
    with pytest.raises(ValueError, match=r"data\.sources a and b have one path.*sum of their"):
        DataConfig.model_validate({"sources": listed})
    urls = [{"name": "a", "path": "s3://b/d"}, {"name": "b", "path": "s3://b/d/"}]
    with pytest.raises(ValueError, match="have one path"):
        DataConfig.model_validate({"sources": urls})


def test_sources_of_two_tokenizers_are_refused(
    folders: list[Path], corpus: Path, tmp_path: Path
) -> None:
    other = train_tokenizer([corpus], tmp_path / "other.json", 290)
    prepare([corpus], other, tmp_path / "o", SEQ_LEN, validation_fraction=0)
    with pytest.raises(DataError, match=r"o/train: made with another tokenizer .*in model"):
        Blend([PackedDataset(f) for f in (folders[0], tmp_path / "o" / "train")], seed=0)


@pytest.fixture(scope="module")
def two_sources(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("second") / "out"
    sources = sorted((Path(__file__).parents[2] / "kernels").glob("*.py"))
    prepare(sources, tiny_data / "tokenizer.json", out, 64, validation_fraction=0)
    listed = [
        {"path": str(tiny_data / "train"), "name": "code", "weight": 0.75},
        {"path": str(out / "train"), "name": "kernels", "weight": 0.25, "max_epochs": 1e-4},
    ]
    return {
        "train": "",
        "sources": listed,
        "stages": [{"from_tokens": 700, "weights": {"code": 1.0}}],
    }


def test_a_run_blends_counts_warns_and_resumes_on_other_ranks(
    two_sources: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    path = write_config(tmp_path, tiny_data, data=two_sources)
    end = run_command("pretrain", path)[0]
    assert end.code == 0, end.output
    assert "the run reads data.sources kernels" in end.output
    metrics = read_metrics(tmp_path / "run")
    tokens = [m["tokens_code"] + m["tokens_kernels"] for m in metrics]
    assert tokens == [m["tokens"] for m in metrics] == [n * 4 * 64 for n in range(1, 7)]
    until_stage = {metrics[step]["tokens_kernels"] for step in (2, 5)}
    assert until_stage == {3 * 64}
    assert "loss_kernels" not in metrics[5]
    assert metrics[5]["loss_code"] == pytest.approx(metrics[5]["loss"])
    mixed = next(m for m in metrics if "loss_kernels" in m and "loss_code" in m)
    assert min(mixed["loss_code"], mixed["loss_kernels"]) <= mixed["loss"]
    assert max(mixed["loss_code"], mixed["loss_kernels"]) >= mixed["loss"]
    resume = tmp_path / "run/checkpoints/step-00000002"
    succeed(
        "pretrain", path, f"--logging.run_dir={tmp_path / 'again'}",
        f"--checkpoint.resume={resume}", ranks=2,
    )  # fmt: skip
    again = read_metrics(tmp_path / "again")
    for one, two in zip(metrics[2:], again, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["tokens_kernels"] == one["tokens_kernels"]


def test_another_order_is_other_data_and_other_weights_are_a_change(
    two_sources: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    path = write_config(
        tmp_path, tiny_data, data=two_sources, training={"steps": 2, "eval_every": 0}
    )
    succeed("pretrain", path)
    listed = [source | {"weight": 0.5} for source in two_sources["sources"]]
    other = write_config(
        tmp_path, tiny_data, data=two_sources | {"sources": listed},
        training={"steps": 4, "eval_every": 0},
    )  # fmt: skip
    end = run_command("pretrain", other, "--data.seed", "77")[0]
    assert end.code == 1
    assert "was trained with another data" in end.output
    end = run_command("pretrain", other)[0]
    assert end.code == 0, end.output
    assert "from step 3 (sample 8) on: weights: " in end.output
