"""Tiles from a file, and the search that fills it, with times and results made up."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import triton

from kernels.ssd import tiles
from kernels.ssd.tiles import Tile, fixed_tile, forced_tile, key, tile, write_tiles
from kernels.ssd.tuning import candidates, fastest, main, make_inputs, run_scan
from kernels.target import Target

H100 = Target("cuda", 90, 132)
SIZE = (torch.bfloat16, 128, 64)
KEY = "cuda 90 bfloat16 P128 N64"
OTHER = Tile(32, 64, 4, 1, None)


def _use(path: Path, content: object, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    monkeypatch.setenv("TRANSXSSM_TILES", str(path))
    tiles.read_tiles.cache_clear()


def test_a_file_replaces_fixed_tiles_of_its_sizes_alone(tmp_path, monkeypatch):
    assert key(H100, *SIZE) == KEY
    write_tiles(tmp_path / "tiles.json", {KEY: OTHER})
    monkeypatch.setenv("TRANSXSSM_TILES", str(tmp_path / "tiles.json"))
    assert tile(H100, *SIZE, 0) == OTHER
    assert tile(H100, *SIZE, 16) == replace(OTHER, chunk=16)
    assert tile(H100, torch.bfloat16, 64, 64, 0) == fixed_tile(H100, torch.bfloat16, 64, 64)
    with forced_tile(replace(OTHER, num_warps=8)):
        assert tile(H100, *SIZE, 0).num_warps == 8
    assert tile(H100, *SIZE, 0) == OTHER
    assert list(tmp_path.iterdir()) == [tmp_path / "tiles.json"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not a file of tiles"),
        ([1], "is not a file of tiles"),
        ({"tiles": {}}, "'triton'"),
        ({"triton": "2.0", "tiles": {}}, "made with Triton 2.0, this is"),
        ({KEY: asdict(OTHER) | {"chunk": 48}}, "chunk = 48, expected one of"),
        ({KEY: asdict(OTHER) | {"p_block": 256}}, "p_block = 256"),
        ({KEY: asdict(OTHER) | {"num_warps": 3}}, "num_warps = 3"),
        ({KEY: asdict(OTHER) | {"maxnreg": 999}}, "maxnreg = 999, expected one of null or 24"),
        ({KEY: asdict(OTHER) | {"colour": 1}}, "colour"),
        ({KEY: {"chunk": 16}}, "p_block"),
        ({"P128": asdict(OTHER)}, "P128: expected a name such as"),
    ],
)
def test_a_bad_file_is_refused(content, says, tmp_path, monkeypatch):
    if isinstance(content, dict) and "tiles" not in content:
        content = {"triton": triton.__version__, "tiles": content}
    _use(tmp_path / "bad.json", content, monkeypatch)
    with pytest.raises(ValueError, match=says) as caught:
        tile(H100, *SIZE, 0)
    assert "TRANSXSSM_TILES" in str(caught.value)
    assert "bad.json" in str(caught.value)


def test_a_missing_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSXSSM_TILES", str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"cannot read .*none\.json: No such file"):
        tile(H100, *SIZE, 0)


@pytest.mark.parametrize("arch", [80, 90, 100, "gfx942"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_candidates_start_with_the_fixed_tile_and_may_stand_in_a_file(arch, dtype, tmp_path):
    target = Target("hip" if arch == "gfx942" else "cuda", arch, 100)
    found = candidates(target, dtype, 64, 128)
    assert found[0] == fixed_tile(target, dtype, 64, 128)
    assert len(set(found)) == len(found) > 4
    for n, choice in enumerate(found):
        path = tmp_path / f"{n}.json"
        write_tiles(path, {key(target, dtype, 64, 128): choice})
        assert list(tiles.read_tiles(path).values()) == [choice]
        assert arch != 100 or choice.num_stages == 1


def test_fastest_passes_over_what_fails_and_what_is_wrong():
    slow, broken, wrong, nan, quick = (Tile(16, 16, warps, 1, None) for warps in (1, 2, 4, 8, 16))
    times = {slow: 3.0, wrong: 0.1, nan: 0.2, quick: 2.0}

    def trial(choice):
        if choice == broken:
            raise RuntimeError("out of shared memory")
        y = torch.ones(8) * {wrong: 1.1, nan: float("nan")}.get(choice, 1.001)
        return times[choice], {"y": y}

    best, outcomes = fastest([slow, broken, wrong, nan, quick], trial, 1e-2)
    assert best == quick
    assert outcomes[slow] == 3.0
    assert outcomes[quick] == 2.0
    assert "out of shared memory" in outcomes[broken]
    assert "y differs" in outcomes[wrong]
    assert "y differs" in outcomes[nan]


def test_the_fixed_tile_must_work():
    def trial(choice):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fastest([OTHER], trial, 1e-2)


def test_what_is_timed_has_a_gradient_of_every_input():
    inputs = make_inputs(1, 20, 2, 16, 16, torch.float32, torch.device("cpu"))
    results = run_scan(inputs, torch.ones_like(inputs["x"]))
    assert all(results[name].shape == inputs[name].shape for name in ("x", "dt", "A", "B", "C"))
    assert all(value.abs().sum() > 0 for value in results.values())


def test_without_a_gpu_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(["--output", str(tmp_path / "tiles.json")])
    assert stopped.value.code == 2
    assert "there is no GPU here to time kernels on" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_no_file_of_tiles_is_refused_at_once(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    monkeypatch.setenv("TRANSXSSM_TILES", str(path))
    tiles.read_tiles.cache_clear()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"TRANSXSSM_TILES: .* is a pipe, not a file"):
        tiles.tuned_tiles()
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"TRANSXSSM_TILES: .* is a device, not a file"):
        tiles.tuned_tiles()
    path.unlink()
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not a file of tiles"):
        tiles.tuned_tiles()
    path.unlink()
    (tmp_path / "keys").write_text("keep")
    path.symlink_to("keys")
    write_tiles(path, {KEY: OTHER})
    assert (tmp_path / "keys").read_text() == "keep"
