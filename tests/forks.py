"""Fast process starts: a server imports torch and ajepa once and then forks for each requested run."""

import contextlib
import gc
import importlib
import itertools
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path


class Forks:
    def __enter__(self) -> "Forks":
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_) -> None:
        self.server.stdin.close()
        self.server.wait(60)

    def _ask(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, argv: list[str], log: Path, call: str = "ajepa.train:main", **environment: str) -> int:
        """Start `call(argv)`, with `call` as "module:function" and the output in `log`, and return the process id.

        KILL="module.function n" lets the process kill itself before its n-th call of that function, and KILL="... n s"
        s seconds later. KILL_RANK limits this to one of several ranks.
        """
        environment["AJEPA_CACHE"] = os.environ["AJEPA_CACHE"]
        return self._ask(argv=argv, log=str(log), call=call, environment=environment, path=sys.path)

    def wait(self, pid: int, seconds: float = 120) -> int:
        """Return the exit status (negative for a signal). After `seconds`, kill the process and raise TimeoutError."""
        status = self._ask(wait=pid, seconds=seconds)
        if status is None:
            raise TimeoutError(f"process {pid} was still running after {seconds} s")
        return status

    def run(self, argv: list[str], log: Path, **options: str) -> int:
        return self.wait(self.start(argv, log, **options))

    def start_ranks(self, world_size: int, argv: list[str], log: Path, **options: str) -> list[int]:
        """Start the ranks of one run as torchrun does, with the output of rank r in `log`.r."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        group = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_PORT": str(port)}
        group["MASTER_ADDR"] = "127.0.0.1"
        return [
            self.start(argv, log.with_suffix(f".{r}"), RANK=str(r), LOCAL_RANK=str(r), **group, **options)
            for r in range(world_size)
        ]

    def run_ranks(self, world_size: int, argv: list[str], log: Path, **options: str) -> list[int]:
        return [self.wait(pid) for pid in self.start_ranks(world_size, argv, log, **options)]


def _serve() -> None:
    import torch
    import torch._dynamo  # which every optimiser loads

    for optional in ("nvidia.dali.fn", "matplotlib.backends.backend_agg", "torch.utils.tensorboard"):  # slow imports
        with contextlib.suppress(ImportError):
            importlib.import_module(optional)
    import ajepa.finetune
    import ajepa.probe
    import ajepa.train

    ajepa.config.parse([])  # tyro and pydantic keep what they learn of the settings
    gc.collect()
    gc.freeze()  # collections of the forks then neither scan nor copy the server's objects
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(json.dumps(_wait(request["wait"], request["seconds"])), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(request["environment"])
            sys.path[1:] = request["path"]  # with the folder of the test that calls; this file's folder stays first
            torch.set_num_threads(1)
            status = 1
            if "KILL" in os.environ and os.environ.get("RANK") == os.environ.get("KILL_RANK"):
                _kill_before(*os.environ["KILL"].split())
            try:
                module, function = request["call"].split(":")
                status = getattr(importlib.import_module(module), function)(request["argv"])
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(json.dumps(pid), flush=True)


def _kill_before(target: str, number: str, seconds: str = "0") -> None:
    owner, name = pkgutil.resolve_name(target.rpartition(".")[0]), target.rpartition(".")[2]
    whole, count = getattr(owner, name), itertools.count(1)

    def fatal(*args, **options):
        if next(count) == int(number):
            if not float(seconds):
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL)).start()
        return whole(*args, **options)

    setattr(owner, name, fatal)


def _wait(pid: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


if __name__ == "__main__":
    _serve()
