"""A real Slurm on this host: a controller and nodes in namespaces of their own.

Nodes have hostnames and addresses, can be powered off and cut from the network; all see the same
files. Everything ends with one process, which ends with this one.
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PROGRAMS = (
    "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel",
    "unshare", "nsenter", "setpriv", "ip",
)  # fmt: skip
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # where the daemons are
NAMESPACES = ("--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
GPUS, CPUS, MEGABYTES = 8, 64, 2_000_000  # what every node claims to have

CONFIGURATION = """\
ClusterName=test
SlurmctldHost=controller
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={dir}/run/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/run/slurmctld.pid
SlurmdPidFile={dir}/run/slurmd-%n.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerNode=500
SlurmdParameters=config_overrides
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
EnforcePartLimits=ALL
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdTimeout=5
MessageTimeout=5
TCPTimeout=1
KillWait=5
MinJobAge=3600
NodeName=node[1-{nodes}] CPUs={cpus} RealMemory={megabytes} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES DefaultTime=10 MaxTime=30-0 State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL DefaultTime=10 State=UP PriorityTier=9
PartitionName=graceful Nodes=ALL DefaultTime=10 State=UP PriorityTier=1 GraceTime=60
"""


def why_not() -> str | None:
    """Why there can be no cluster here, or None."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge iproute2"
    tried = subprocess.run(
        ["unshare", *NAMESPACES, "--mount-proc", "true"], capture_output=True, text=True
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class Cluster:
    """Runs from its making to `stop`."""

    def __init__(self, nodes: int = 4) -> None:
        self.nodes = nodes
        self.dir = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # paths of sockets are short
        self.dir.chmod(0o755)  # or munged refuses
        for name in ("etc", "log", "run", "state", "spool"):
            (self.dir / name).mkdir()
        self._configure()
        self.env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH", "SQUEUE", "SINFO"))
        }
        self.env |= {"SLURM_CONF": str(self.dir / "etc/slurm.conf"), "PATH": PATH}
        supervisor = Path(__file__).with_name("slurm_cluster.sh")
        with (self.dir / "log/supervisor.out").open("w") as output:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, "--mount-proc", "--",
                 str(supervisor), str(self.dir), str(nodes)],
                env=self.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _configure(self) -> None:
        etc = self.dir / "etc"
        user = subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip()
        text = CONFIGURATION.format(
            dir=self.dir, user=user, nodes=self.nodes, cpus=CPUS, megabytes=MEGABYTES, gpus=GPUS
        )
        (etc / "slurm.conf").write_text(text)
        # terminals in place of GPUs: Slurm wants devices
        (etc / "gres.conf").write_text(f"Name=gpu File=/dev/tty[0-{GPUS - 1}]\n")
        lines = ["127.0.0.1 localhost", "10.77.0.254 controller"]
        lines += [f"10.77.0.{node} node{node}" for node in range(1, self.nodes + 1)]
        (etc / "hosts").write_text("\n".join(lines) + "\n")
        (etc / "munge.key").write_bytes(os.urandom(128))
        (etc / "munge.key").chmod(0o400)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + 30
        while not (self.dir / "run/ready").exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                logs = [path.read_text()[-2000:] for path in (self.dir / "log").iterdir()]
                raise RuntimeError("the cluster does not start:\n" + "\n".join(logs))
            time.sleep(0.02)
        children = f"/proc/{self._process.pid}/task/{self._process.pid}/children"
        inner = Path(children).read_text().split()[0]
        self._enter = ["nsenter", "-t", inner, "-n", "-p", "-m", "-u", "-i"]
        self.wait_for_nodes()

    def wait_for_nodes(self, timeout: float = 30) -> None:
        """Until every node is idle. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while (states := self.run("sinfo", "-hN", "-p", "main", "-o", "%T").stdout.split()) != [
            "idle"
        ] * self.nodes:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nodes are {states}")
            time.sleep(0.1)

    def run(
        self, *words: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A command on the controller."""
        return subprocess.run(
            [*self._enter, f"--wd={cwd or self.dir}", *map(str, words)],
            env=self.env | (env or {}), capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def sbatch(
        self, *words: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> str:
        """The id of the job. Raises AssertionError with what sbatch says."""
        done = self.run("sbatch", "--parsable", *words, cwd=cwd, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().split(";")[0]

    def job(self, job_id: str) -> dict[str, str]:
        """What scontrol shows of it."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job_id).stdout
        return dict(re.findall(r"(?:^|\s)([A-Za-z:/_]+)=(\S*)", shown))

    def wait(self, job_id: str, states: Sequence[str] = ENDED, timeout: float = 60) -> str:
        """Until the job is in one of the states, which is returned. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while (job := self.job(job_id)).get("JobState") not in states:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id}: {job}")
            time.sleep(0.1)
        return job["JobState"]

    def power_off(self, node: int) -> None:
        """Kill everything on it at once."""
        self._command("off", node)

    def power_on(self, node: int) -> None:
        """Boot it."""
        self._command("on", node)

    def cut(self, node: int) -> None:
        """Pull its network cable."""
        self._command("cut", node)

    def mend(self, node: int) -> None:
        """Put it in again."""
        self._command("mend", node)

    def _command(self, what: str, node: int) -> None:
        with (self.dir / "run/commands").open("w") as pipe:
            pipe.write(f"{what} {node}\n")

    def stop(self) -> None:
        """End everything and remove the folder."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self.dir, ignore_errors=True)
