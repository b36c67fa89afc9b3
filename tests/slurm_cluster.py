"""A real Slurm cluster of three nodes on one machine: slurmctld, slurmd and munged of Debian, as root.

Each node, and the controller, is a network namespace with an address of its own on a bridge, and a host name of its
own; all share the file system, but for `private`, which is another folder on each node. A node has 16 CPUs and 2 GPUs
as far as Slurm is concerned: the GPUs are device files with nothing behind them, and tests/no_gpu stands in for CUDA.

    with SlurmCluster(folder) as cluster:
        cluster.run("node1", "sbatch", "job.sh")
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from faulty import write_script

ROOT = Path(__file__).parent.parent
FILES = ["raytune_bayesian.py", "hpo", "ds_config.json", "head_node.slurm", "worker_node.slurm", "cluster.env"]


def copy_project(folder: Path) -> None:
    """Copies what a user needs to run the experiment in another folder."""
    for name in FILES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)


NO_GPU = ROOT / "tests" / "no_gpu"  # on PYTHONPATH: a stand-in for CUDA
GPU_TYPES = {"node1": "v100", "node2": "v100", "node3": "a100"}
NODES = list(GPU_TYPES)
OWN = ["--gpus-per-node=1", "--cpus-per-task=2", "--mem=6G"]  # what a head job asks for, to train in it
TWO_NODES = {"NUM_WORKERS": "2", "MEM_PER_NODE": "13G"}  # workers that do not fit on one node
BOTH_GPUS = {"GPUS_PER_NODE": "2", "CPUS_PER_NODE": "2"}  # of a worker's node; a process for each takes time to start
HOSTS = [*NODES, "controller"]
NETWORK, IPV6 = "10.77.0", "fd77"
PROGRAMS = ["slurmctld", "slurmd", "slurmdbd", "mariadbd", "munged", "sbatch", "ip", "nsenter", "unshare"]


def missing() -> str | None:
    """Why there can be no cluster on this machine; None where there can."""
    if os.getuid() != 0:
        return "only root can make network namespaces"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    packages = "slurm-wlm slurmdbd mariadb-server munge iproute2"
    return f"not installed: {', '.join(absent)} (Debian packages {packages})" if absent else None


def sh(command: str, check: bool = True) -> str:
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    if check and done.returncode != 0:
        raise RuntimeError(f"{command}: {done.stdout}{done.stderr}")
    return done.stdout


def wait_for(what: str, condition, timeout: float = 30, every: float = 0.1):
    """Polls until condition() is true and returns its value; RuntimeError with `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {timeout:.0f} s for {what}")
        time.sleep(every)
    return value


class SlurmCluster:
    """Three nodes; `folder` is empty, short and on a disk."""

    def __init__(self, folder: Path, gpus: int = 2):
        self.folder, self.gpus = folder, gpus
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen] = {}

    # -- start and stop -----------------------------------------------------------------------------------------------

    def __enter__(self):
        try:
            self._configure()
            self._network()
            if sh("munge -n | unmunge", check=False) == "":  # unless this machine has one running
                self._munge()
            sh(f"mkdir -p {self.folder}/state")
            self._accounting()
            self._start("slurmctld", self.command("controller", "slurmctld", "-D", "-f", f"{self.folder}/slurm.conf"))
            for node in NODES:
                self.start_node(node)
            wait_for("three idle nodes", lambda: self.states() == ["idle"] * 3, 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception):
        if "slurmctld" in self.daemons:
            self.run(NODES[0], "scancel", "--user", "root", check=False)
            try:
                wait_for("an empty queue", lambda: not self.queue(), 40)
            except RuntimeError:
                pass  # the processes are ended below
        for name in [*NODES, "slurmctld", "slurmdbd", "mariadbd", "munged"]:
            self.stop(name)
        self._remove_hosts()
        shutil.rmtree(self.folder / "state", ignore_errors=True)

    def _configure(self):
        f = self.folder
        devices = [f / f"gpu{i}" for i in range(self.gpus)]
        for device in devices:
            sh(f"mknod {device} c 1 3")
        nodes = "\n".join(
            f"NodeName={n} NodeAddr={self.address(n)} CPUs=16 RealMemory=24000 Gres=gpu:{kind}:{self.gpus} Feature=fast"
            for n, kind in GPU_TYPES.items()
        )
        (f / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost=controller({self.address("controller")})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=15
KillWait=10
StateSaveLocation={f}/state
SlurmdSpoolDir={f}/spool-%n
SlurmctldPidFile={f}/slurmctld.pid
SlurmdPidFile={f}/slurmd-%n.pid
SlurmctldLogFile={f}/slurmctld.log
SlurmdLogFile={f}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={self.address("controller")}
AccountingStorageEnforce=associations,limits,qos
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
GresTypes=gpu
ReturnToService=2
Licenses=squad:4
MpiDefault=none
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE
PartitionName=closed Nodes=ALL AllocNodes=elsewhere MaxTime=INFINITE
""")
        (f / "gres.conf").write_text(
            "AutoDetect=off\n"
            + "".join(
                f"NodeName={n} Name=gpu Type={kind} File={f}/gpu[0-{self.gpus - 1}]\n" for n, kind in GPU_TYPES.items()
            )
        )
        (f / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (f / "private").mkdir()

    def _network(self):
        self._remove_hosts()  # of a test that was killed
        sh("ip link add slurmtest type bridge && ip link set slurmtest up")
        for host in HOSTS:
            sh(f"ip netns add {host} && ip link add veth-{host} type veth peer name eth0 netns {host}")
            sh(f"ip link set veth-{host} master slurmtest && ip link set veth-{host} up")
            sh(
                f"ip -n {host} addr add {self.address(host)}/24 dev eth0 && ip -n {host} link set eth0 up "
                f"&& ip -n {host} link set lo up"
            )
            # a second network, which has IPv6 only
            six = f"{IPV6}::{HOSTS.index(host) + 1}/64"
            sh(f"ip link add six-{host} type veth peer name six netns {host}")
            sh(f"ip link set six-{host} master slurmtest && ip link set six-{host} up")
            sh(f"ip -n {host} addr add {six} dev six nodad && ip -n {host} link set six up")

    def _remove_hosts(self):
        for host in HOSTS:
            for pid in sh(f"ip netns pids {host}", check=False).split():
                os.kill(int(pid), signal.SIGKILL)
            sh(f"ip link del veth-{host}; ip link del six-{host}; ip netns del {host}", check=False)
        sh("ip link del slurmtest", check=False)

    def _munge(self):
        sh("mkdir -p /run/munge && chown munge: /run/munge && chmod 755 /run/munge")
        self._start(
            "munged",
            ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged", "--foreground", "--force"],
        )
        wait_for("munged", lambda: sh("munge -n | unmunge", check=False))

    def _accounting(self):
        """Starts slurmdbd with a database of its own. There is an account, and a QOS of one job a user."""
        data, socket, f = self.folder / "database", self.folder / "mysql", self.folder
        sh(f"mkdir -p {data} && chown mysql: {data} && chmod 755 {f}")
        sh(f"mariadb-install-db --user=mysql --datadir={data} --auth-root-authentication-method=normal --skip-test-db")
        sh(f"mkdir -p {socket} && chown mysql: {socket}")
        options = [f"--datadir={data}", f"--socket={socket}/socket", f"--pid-file={socket}/pid", "--skip-networking"]
        small = ["--innodb-buffer-pool-size=32M", "--innodb-flush-log-at-trx-commit=0"]
        self._start("mariadbd", ["mariadbd", "--no-defaults", "--user=mysql", *options, *small])
        wait_for("the database", lambda: sh(f"mariadb -S {socket}/socket -e 'select 1'", check=False), 60)
        (f / "slurmdbd.conf").write_text(f"""
AuthType=auth/munge
DbdHost=controller
DbdAddr={self.address("controller")}
SlurmUser=root
LogFile={f}/slurmdbd.log
PidFile={f}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
""")
        (f / "slurmdbd.conf").chmod(0o600)
        self.environment["MYSQL_UNIX_PORT"] = f"{socket}/socket"
        self._start("slurmdbd", self.command("controller", "slurmdbd", "-D", "-v"))
        for what in ("cluster test", "account lab", "user root account=lab", "qos single MaxJobsPerUser=1"):
            add = ["sacctmgr", "-i", "add", *what.split()]
            wait_for(f"sacctmgr: {what}", lambda add=add: self.run("controller", *add, check=False), 60, every=0.5)
        self.run("controller", "sacctmgr", "-i", "modify", "user", "root", "set", "qos+=single")

    def start_node(self, node: str):
        """Starts the node's slurmd: in the node's network, with its host name and its own `private` folder.

        All but the first may not submit jobs: /bin/false stands for sbatch there.
        """
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        script = (
            f"hostname {node}; mount -t tmpfs tmpfs {self.folder}/private; mkdir -p /tmp/ray; "
            "mount -t tmpfs tmpfs /tmp/ray; "  # Ray's own place for files, without those of others on this machine
            + f"mount --bind /bin/false {shutil.which('sbatch')}; " * (node != NODES[0])
            + f"exec slurmd -D -N {node} -f {self.folder}/slurm.conf"
        )
        namespace = f"--net=/var/run/netns/{node}"
        self._start(node, ["nsenter", namespace, "unshare", "--uts", "--mount", "sh", "-c", script])

    def files_of_ray(self, node: str) -> list[str]:
        """What is in the node's own /tmp/ray."""
        process = self.daemons.get(node)  # None while a test has taken the node away
        return sh(f"nsenter --mount=/proc/{process.pid}/ns/mnt ls /tmp/ray").split() if process else []

    def _start(self, name: str, command: list[str]):
        with open(self.folder / f"{name}.out", "a") as log:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def stop(self, name: str, how=signal.SIGTERM):
        """Ends a daemon."""
        process = self.daemons.pop(name, None)
        if process is not None:
            process.send_signal(how)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # -- use ----------------------------------------------------------------------------------------------------------

    def address(self, host: str) -> str:
        return f"{NETWORK}.{HOSTS.index(host) + 1}"

    def command(self, node: str, *command: str) -> list[str]:
        """The command, to be run on a node."""
        inside = 'hostname "$0"; exec "$@"'
        return [
            "nsenter",
            f"--net=/var/run/netns/{node}",
            "unshare",
            "--uts",
            "sh",
            "-c",
            inside,
            node,
            *map(str, command),
        ]

    def run(
        self,
        node: str,
        *command: str,
        check: bool = True,
        timeout: float = 60,
        cwd: Path | None = None,
        **environment: str,
    ) -> str:
        """Runs a command on a node to its end; its output. RuntimeError when it fails and check is true."""
        done = subprocess.run(
            self.command(node, *command), env={**self.environment, **environment}, cwd=cwd,
            capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise RuntimeError(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def queue(self) -> list[str]:
        """Jobs in the queue, of those that are not done."""
        return self.run(NODES[0], "squeue", "-h", "-o", "%i").splitlines()

    def states(self) -> list[str]:
        """State of each node in the default partition; nothing before the controller answers."""
        return self.run(NODES[0], "sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split()

    def job(self, job_id: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        text = self.run(NODES[0], "scontrol", "show", "job", job_id)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def processes(self, node: str) -> dict[int, str]:
        """Processes of jobs on a node: {pid: command line}. The node's slurmd is none.

        Nor is a process that is ending: it has no command line any more.
        """
        network = os.stat(f"/var/run/netns/{node}").st_ino
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, OSError):  # it ends meanwhile
                if os.stat(f"/proc/{process.pid}/ns/net").st_ino == network and (command := process.cmdline()):
                    found[process.pid] = " ".join(command)
        return {pid: command for pid, command in found.items() if "slurmd" not in command}

    def kill_raylet(self, node: str) -> None:
        """Kills Ray's main process on a node."""
        (pid,) = (p for p, command in self.processes(node).items() if "/raylet" in command.split(" ")[0])
        os.kill(pid, signal.SIGKILL)


class Project:
    """A user's copy of the project on the cluster, with a temporary folder that nobody else uses."""

    def __init__(self, cluster: SlurmCluster, folder: Path, temporary: Path):
        self.cluster, self.folder, self.temporary = cluster, folder, temporary
        copy_project(folder)
        (folder / "logs").mkdir()
        (folder / "home").mkdir()

    def hand(self, body: str) -> None:
        """Makes the project's script one with another `train`, see faulty.write_script; the honest one is
        experiment.py.
        """
        script = self.folder / "raytune_bayesian.py"
        if not (self.folder / "experiment.py").exists():
            script.rename(self.folder / "experiment.py")
        write_script(script, body, "experiment")

    def submit(self, *arguments, node="node1", options=(), **environment) -> str:
        """Submits the head job; its id."""
        settings = {
            "VENV": sys.prefix, "NUM_WORKERS": "1", "GPUS_PER_NODE": "1", "CPUS_PER_NODE": "1", "MEM_PER_NODE": "3G",
            "WORKER_TIMEOUT": "400", "TMPDIR": str(self.temporary), "HOME": str(self.folder / "home"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(NO_GPU), os.environ.get("PYTHONPATH")])), **environment,
        }  # fmt: skip
        command = ["sbatch", "--parsable", f"--nodelist={node}", *options, "head_node.slurm", *map(str, arguments)]
        return self.cluster.run("node1", *command, cwd=self.folder, **settings).strip()

    def log(self, job_id: str) -> str:
        path = self.folder / "logs" / f"ray_head_bloom_bohb-{job_id}.out"
        return path.read_text() if path.exists() else ""

    def wait_for(self, what: str, condition, timeout=400):  # a busy machine is several times slower
        try:
            return wait_for(what, condition, timeout)
        except RuntimeError as error:
            slurm = "".join(
                self.cluster.run("node1", *what, check=False) for what in (["sinfo", "-N", "-l"], ["squeue", "-l"])
            )
            logs = "\n".join(f"== {p.name}\n{p.read_text()}" for p in sorted((self.folder / "logs").iterdir()))
            raise RuntimeError(f"{error}\n{logs}\n{slurm}") from None

    def wait_for_end(self, job_id: str, timeout=900):
        """Waits until the head job is out of the queue; (state, exit code), as Slurm keeps them."""
        self.wait_for(f"the end of job {job_id}", lambda: job_id not in self.cluster.queue(), timeout)
        job = self.cluster.job(job_id)
        return job["JobState"], job["ExitCode"]

    def wait_for_search(self, job_id: str):
        """Waits until a trial of the job has reported."""
        self.wait_for(f"a trial of job {job_id}", lambda: "] trial " in self.log(job_id))

    def workers(self, job_id: str) -> list[str]:
        return re.search(r"worker jobs ([\d ]+)", self.log(job_id)).group(1).split()

    def left_over(self) -> dict:
        """What runs or lies around on any node, of jobs: empty when all is clean."""
        ports = {n: sh(f"ip netns exec {n} ss -Hltn | grep -v :6818", check=False) for n in NODES}
        found = {
            "queue": self.cluster.queue(),
            "processes": {n: p for n in NODES if (p := self.cluster.processes(n))},
            "ports": {n: p for n, p in ports.items() if p},
            "temporary": sorted(map(str, self.temporary.iterdir())),
            "rendezvous": sorted(map(str, self.folder.glob("results/.ray-*"))),
            # where Ray keeps things when it is left to itself
            "home": sorted(map(str, (self.folder / "home").glob(".ray*"))),
            "/tmp/ray": [n for n in NODES if self.cluster.files_of_ray(n)],
        }
        return {key: value for key, value in found.items() if value}
