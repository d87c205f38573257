"""The page of a run: its figures are there, and a browser draws them."""

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from matplotlib.cbook import is_math_text
from PIL import Image
from typer.testing import CliRunner

from pretrain.cli import app
from pretrain.config import ConfigError, dump_config
from pretrain.console import literal
from pretrain.report import MAX_CURVES, MAX_MARKS, MAX_POINTS, read_record, write_report
from tests.conftest import missing
from tests.tiny import tiny_config
from untrusted.text import printable

# Draws every image on a canvas and counts what is not white: what the browser made of it
COUNT_INK = """<script>window.onload = () => { for (const image of document.images) {
  const canvas = document.createElement('canvas');
  canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
  const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);
  const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
  let ink = 0;
  for (let i = 0; i < data.length; i += 4) if (data[i] + data[i + 1] + data[i + 2] < 600) ink++;
  image.setAttribute('data-ink', ink); } }</script>"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 3,000 steps that began twice, with every kind of metric."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = tiny_config(tmp_path, folder, training={"steps": 3000})
    (folder / "config.toml").write_text(dump_config(config))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 3001):
            line: dict[str, Any] = {
                "step": step, "tokens": 512 * step, "loss": 3 + 3 * math.exp(-step / 500),
                "loss_code": 2.9, "loss_prose": 3.1, "grad_norm": 1.0, "lr": 1e-3,
                "tokens_per_second": 1e4 + step % 7, "memory_bytes": 1 << 30, "time_data": 0.01,
                "time_forward_backward": 0.2, "time_step": 0.05, "time_checkpoint": 0.0,
            }  # fmt: skip
            if step % 50 == 0:
                line |= {"update_ratio_ssd": 1e-3, "grad_norm_ssd": 0.5, "ssd_decay": 0.9}
            if step % 500 == 0:
                line |= {"validation_loss": 3.5 - step / 9000, "validation_loss_from_0": 4.0,
                         "validation_loss_from_16": 3.2}  # fmt: skip
            if step == 1500:
                line |= {"loss": None, "grad_norm": None, "skipped_updates": 1}
            file.write(json.dumps(line) + "\n")
        file.write('{"step": 3001, "lo')  # being written
    events = [{"event": "start", "step": 0, "said": "on 2 ranks"},
              {"event": "update skipped", "step": 1500, "said": "loss nan <here>"},
              {"event": "start", "step": 2000, "said": "on 4 ranks"}]  # fmt: skip
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    start = {"time": "now", "host": "node7", "world_size": 2, "git_revision": "abc"}
    (folder / "environment.json").write_text(json.dumps([start, start | {"world_size": 4}]))
    return folder


def test_what_the_page_says(run_dir: Path) -> None:
    page = write_report(run_dir, run_dir / "report.html").read_text()
    for said in (
        "3,000 of 3,000",
        "node7",
        "loss nan &lt;here&gt;",
        "micro_batch_size = 2",
        "76.9%",
    ):
        assert said in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing from elsewhere
    titles = re.findall(r'<img alt="([^"]+)"', page)
    assert titles[0] == "Loss"
    assert "Validation loss by tokens of the document before" in titles
    assert "Update over weight, by kind of layer" in titles
    assert len(titles) == 11


NAMES = [
    "$a^b_c$",
    "$",
    r"$\frac{",
    "<b>x</b>",
    "\x1b[31m",
    "_under",
    "a\nb",
    "é 語",
    r"\$x",
    "%s{0}",
]


def test_names_from_outside_are_text(run_dir: Path) -> None:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()[:9]]
    lines = [line | {f"loss_{name}": 2.0 for name in NAMES} for line in lines]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    event = {"event": "<script>", "step": 3, "said": "https://u:hunter2@h/<img>"}
    (run_dir / "events.jsonl").write_text(json.dumps(event) + "\n")
    page = write_report(run_dir, run_dir / "report.html").read_text()
    assert "<b>" not in page
    assert "<script" not in page
    assert "https://***@h/&lt;img&gt;" in page
    for name in NAMES:  # as matplotlib reads labels
        assert not is_math_text(literal(name))
        assert literal(name).replace(r"\$", "$") == printable(name)


def test_many_names_and_events_are_drawn_in_part(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = {f"{prefix}{n}": 2.0 for n in range(100) for prefix in ("loss_", "grad_norm_")}
    lines = [{"step": step, "loss": 2.0} | many for step in (1, 2)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    event = json.dumps({"event": "start", "step": 1, "said": ""}) + "\n"
    (run_dir / "events.jsonl").write_text(event * 1000)
    drawn: list[int] = []
    close = plt.close

    def count(figure: Any) -> None:
        drawn.append(len(figure.axes[0].lines))
        close(figure)

    monkeypatch.setattr(plt, "close", count)
    write_report(run_dir, run_dir / "report.html")
    assert sorted(drawn)[-2:] == [MAX_CURVES + 1 + MAX_MARKS] * 2
    assert min(drawn) > MAX_MARKS


def test_where_the_page_is_is_told_without_escapes(run_dir: Path) -> None:
    out = run_dir / os.fsdecode(b"\x1b[31m\xff.html")
    done = CliRunner().invoke(app, ["report", str(run_dir), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert out.exists()
    assert "\\x1b[31m\\udcff.html" in done.output


def test_curves_are_thinned_and_gaps_left_out(run_dir: Path) -> None:
    record = read_record(run_dir)
    steps, values = record.curve("loss")
    assert len(steps) == MAX_POINTS
    assert steps.mean() == pytest.approx((3000 * 3001 / 2 - 1500) / 2999, rel=1e-3)
    assert values[0] == pytest.approx(6, abs=0.02)
    assert len(record.curve("validation_loss")[0]) == 6
    assert len(record.curve("no such metric")[0]) == 0


def test_what_is_no_run(tmp_path: Path, run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="no run directory"):
        write_report(tmp_path, tmp_path / "report.html")
    (run_dir / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl has no step"):
        write_report(run_dir, run_dir / "report.html")
    assert not (run_dir / "report.html").exists()


def browser(*words: str | Path) -> str:
    """What headless Chromium prints."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        missing("no chromium: apt-get install chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    done = subprocess.run(
        [program, *flags, *map(str, words)], capture_output=True, text=True, timeout=120,
        env=os.environ | {"HOME": str(Path(words[-1]).parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_browser_draws_every_figure(run_dir: Path) -> None:
    page = write_report(run_dir, run_dir / "report.html")
    checked = run_dir / "checked.html"
    checked.write_text(page.read_text().replace("</body>", COUNT_INK + "</body>"))
    drawn = browser("--virtual-time-budget=20000", "--dump-dom", checked)
    ink = [int(n) for n in re.findall(r'data-ink="(\d+)"', drawn)]
    assert len(ink) == 11
    assert min(ink) > 2000  # axes, ticks, words and a curve
    shot = run_dir / "report.png"
    browser(f"--screenshot={shot}", "--window-size=1200,2400", page)
    pixels = Image.open(shot).convert("L")
    assert pixels.size == (1200, 2400)
    halves = [pixels.crop((0, top, 1200, top + 600)) for top in (0, 600, 1200, 1800)]
    assert all(sum(half.histogram()[:200]) > 2000 for half in halves)
