"""slurm/gpu_smoke.sbatch says PASS, or what failed, with a quick program in place of ours."""

from pathlib import Path

from benchmarks.slurm_cluster import Cluster

ROOT = Path(__file__).parents[2]
PROGRAM = """\
#!/bin/bash
# a run of 50 quick steps that stops when told to, and goes on at its next start
trap '' TERM  # as training, which a rank that has stopped already does not take along
[[ $1 != "$BROKEN" ]] || { echo "$1 is broken"; exit 3; }
[[ $1 == pretrain && $SLURM_PROCID == 0 ]] || { [[ $1 == pretrain ]] || exit 0; trap 'exit 85' USR1
    [[ ${SLURM_RESTART_COUNT:-0} == 0 ]] || exit 0; sleep 20 & wait; exit 0; }
for word in "$@"; do [[ $word != --logging.run_dir=* ]] || run=${word#*=}; done
mkdir -p "$run"
echo '"world_size": 2' >>"$run/environment.json"
trap 'exit 85' USR1
made=$(wc -l 2>/dev/null <"$run/metrics.jsonl" || echo 0)
while ((made < 50)); do
    made=$((made + 1))
    echo "{\\"step\\": $made}" >>"$run/metrics.jsonl"
    sleep 0.05
done
"""


def test_smoke_test_gives_one_verdict(cluster: Cluster, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/demo.toml").write_text("[data]\nseq_len = 64\n")
    jobs = {
        broken: cluster.sbatch(
            "--nodes=2", "--ntasks-per-node=1", ROOT / "slurm/gpu_smoke.sbatch", cwd=tmp_path,
            env={"TRANSXSSM": str(program), "BROKEN": broken},
        )
        for broken in ("nothing", "preflight", "checkpoint")
    }  # fmt: skip
    last = {}
    for broken, job in jobs.items():
        assert cluster.wait(job) == ("COMPLETED" if broken == "nothing" else "FAILED")
        log = (tmp_path / f"transxssm-smoke-{job}.log").read_text()
        (last[broken],) = [line for line in log.splitlines() if "after" in line]
    assert last["nothing"].startswith("== PASS")
    assert last["nothing"].endswith("2 tasks: preflight, 50 steps, requeue, resume, export")
    assert last["preflight"].endswith("preflight")
    assert last["preflight"].startswith("== FAIL")
    assert last["checkpoint"].endswith("export")
    assert last["checkpoint"].startswith("== FAIL")
