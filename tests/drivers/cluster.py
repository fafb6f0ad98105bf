"""A private Slurm cluster of two virtual nodes on 127.0.0.1: python tests/drivers/cluster.py FOLDER.

It has a munge, ports and files of its own, touches no service of the system, and lives until its standard input ends,
which happens however the program that holds the other end ends. Then everything that it started, jobs included, is
ended: that is what has ``DDML_CLUSTER=FOLDER`` in its environment. Partition ``low`` is the default, ``high``
preempts it. :class:`Cluster` is for who uses it.
"""

from __future__ import annotations

import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PACKAGES = ("munge", "slurm-client", "slurmctld", "slurmd")
SBIN = "/usr/sbin:/sbin"
NODES = ("n1", "n2")
CPUS = 16  # of a node, whatever there is: most jobs of tests sleep
PATIENCE = 300.0  # seconds that an event may take on a busy machine

given_up = threading.Event()  # nobody waits for anything any more

CONFIGURATION = """
ClusterName=ddml
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
TmpFS={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=pmix
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=5
KillWait=30
MinJobAge=3600
JobRequeue=1
MailProg=/bin/true
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=10000,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus}
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
"""


class UnavailableError(Exception):
    """There is no Slurm here and it cannot be installed: why, in a line."""


def install() -> None:
    """Install Debian's packages where they are missing; what they would start is not started.

    Raises
    ------
    UnavailableError
        Where that cannot be.
    """
    if all(
        shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") for name in ("munged", "slurmctld", "slurmd", "srun")
    ):
        return
    if os.getuid() or not shutil.which("apt-get"):
        raise UnavailableError(f"no Slurm here, and only root of a Debian system installs it: {' '.join(PACKAGES)}")
    policy = Path("/usr/sbin/policy-rc.d")  # Debian's way to keep services from being started
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        for words in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run([*apt, *words], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["apt-get failed"])[-1]
            raise UnavailableError(f"Debian's packages of Slurm cannot be installed: {reason}")
    finally:
        if ours:
            policy.unlink()


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens to, below those that the system gives to whoever connects."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20000, 30000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found += [port] if port not in found else []
    return found


def wait_for(what: str, test: Callable[[], object], patience: float = PATIENCE) -> None:
    """Return when the test is true.

    Raises
    ------
    TimeoutError
        When that has not happened in so many seconds, or waiting was given up.
    """
    end = time.monotonic() + patience
    while not test():
        if time.monotonic() > end or given_up.is_set():
            raise TimeoutError(f"waited {patience:.0f} s for {what}")
        time.sleep(0.1)


class Cluster:
    """The cluster in a folder, running or not.

    Parameters
    ----------
    folder
        Everything of it, an absolute path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._asking, self._asked, self._jobs = threading.Lock(), 0.0, list[dict[str, str]]()
        self.mark = f"DDML_CLUSTER={folder}"  # in the environment of everything that belongs to it

    @property
    def environment(self) -> dict[str, str]:
        """Of who talks to it: nothing of another MPI or Slurm, ours instead."""
        foreign = ("OMPI_", "PMIX_", "ORTE_", "SLURM", "SBATCH", "PETSC_OPTIONS")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        name, _, value = self.mark.partition("=")
        path = f"{os.environ['PATH']}:{SBIN}"
        return clean | {"SLURM_CONF": f"{self.folder}/slurm.conf", "PATH": path, name: value}

    def processes(self, **variables: object) -> list[int]:
        """Ids of all that belongs to it, or of those with such variables in their environment."""
        wanted, found = {self.mark} | {f"{name}={value}" for name, value in variables.items()}, []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if wanted <= {*(entry / "environ").read_bytes().decode(errors="replace").split("\0")}:
                    found.append(int(entry.name))
        return found

    def kill(self, **variables: object) -> None:
        """SIGKILL to all of these, until there are none."""
        while alive := self.processes(**variables):
            for pid in alive:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def call(self, *words: object, folder: Path | None = None) -> str:
        """What a command prints, in a folder or here.

        Raises
        ------
        AssertionError
            If it fails; the text is what it says.
        """
        done = subprocess.run(
            [*map(str, words)], env=self.environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False, timeout=PATIENCE,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    def jobs(self) -> list[dict[str, str]]:
        """What ``scontrol show job`` says of each, as it was at most half a second ago: many may ask."""
        with self._asking:
            if time.monotonic() > self._asked + 0.5:
                lines = self.call("scontrol", "show", "job", "-o").splitlines()
                self._jobs = [dict(word.partition("=")[::2] for word in line.split()) for line in lines]
                self._asked = time.monotonic()
            return self._jobs

    def start_node(self, name: str) -> None:
        """Start the daemon of a node, and wait until the node takes jobs."""
        # its steps and ranks have that name in their environment, too
        subprocess.run(["slurmd", "-N", name], env=self.environment | {"SLURMD_NODENAME": name}, check=True)
        wait_for(
            f"node {name}", lambda: self.call("sinfo", "-h", "-n", name, "-o", "%T").split()[0] in ("idle", "mixed")
        )

    def start(self) -> None:
        """Start it; returns when all nodes are idle."""
        munge = self.folder / "munge"
        for name in ("munge", "state", *NODES):
            (self.folder / name).mkdir(mode=0o755)
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o600)
        fields = {"host": socket.gethostname().partition(".")[0], "user": getpass.getuser(), "folder": self.folder}
        ports = free_ports(3)
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**fields, ports=ports, cpus=CPUS))
        files = [f"--{option}={munge}/{option}" for option in ("socket", "pid-file", "log-file", "seed-file")]
        munged = ["munged", "--force", f"--key-file={munge}/key", *files]
        for command in (munged, ["slurmctld"]):
            subprocess.run(command, env=self.environment, check=True, timeout=PATIENCE)
        for name in NODES:
            self.start_node(name)

    def end(self) -> None:
        """End all of it."""
        with suppress(subprocess.SubprocessError, OSError, AssertionError):
            self.call("scancel", "--quiet", "--user", getpass.getuser())
        self.kill()


def main() -> None:
    """Run a cluster until the standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    cluster = Cluster(Path(sys.argv[1]).resolve())
    try:
        install()
        cluster.start()
        print("ready", flush=True)
        sys.stdin.read()
    except UnavailableError as error:
        print(error, flush=True)
    finally:
        cluster.end()


if __name__ == "__main__":
    main()
