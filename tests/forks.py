"""Fast process starts: a server imports torch and ajepa once and then forks for each requested run."""

import builtins
import contextlib
import fnmatch
import gc
import importlib
import io
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
from collections.abc import Callable
from functools import partial
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
        s seconds later. HANG="module.function n" stops it there until a signal continues it, and HANG="... n s" for s
        seconds. FULL="*/name" lets every write into a file of that pattern fail as on a full disk. SKEW="s" sets the
        clock s seconds ahead. Commas separate several of a kind. KILL_RANK, HANG_RANK, FULL_RANK and SKEW_RANK limit
        these to one of several ranks.
        """
        environment.setdefault("AJEPA_CACHE", os.environ["AJEPA_CACHE"])
        return self._ask(argv=argv, log=str(log), call=call, environment=environment, path=sys.path)

    def wait(self, pid: int, seconds: float = 120) -> int:
        """Return the exit status (negative for a signal). After `seconds`, kill the process and raise TimeoutError."""
        status = self._ask(wait=pid, seconds=seconds)
        if status is None:
            raise TimeoutError(f"process {pid} was still running after {seconds} s")
        return status

    def run(self, argv: list[str], log: Path, **options: str) -> int:
        return self.wait(self.start(argv, log, **options))

    def start_ranks(
        self, world_size: int, argv: list[str], log: Path, own: dict[int, list[str]] | None = None, **options: str
    ) -> list[int]:
        """Start the ranks of one run as torchrun does, with the output of rank r in `log`.r.

        `own[r]` are arguments that only rank r gets.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        group = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_PORT": str(port)}
        group["MASTER_ADDR"] = "127.0.0.1"
        return [
            self.start(
                [*argv, *(own or {}).get(r, [])],
                log.with_suffix(f".{r}"),
                **{"RANK": str(r), "LOCAL_RANK": str(r), **group, **options},
            )
            for r in range(world_size)
        ]

    def run_ranks(self, world_size: int, argv: list[str], log: Path, **options) -> list[int]:
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
            for name, damage in (("KILL", _kill_before), ("HANG", _hang_before), ("FULL", _fill), ("SKEW", _skew)):
                if name in os.environ and os.environ.get(f"{name}_RANK") in (None, os.environ.get("RANK")):
                    for what in os.environ[name].split(","):
                        damage(*what.split())
            try:
                module, function = request["call"].split(":")
                status = getattr(importlib.import_module(module), function)(request["argv"])
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(json.dumps(pid), flush=True)


def _before(target: str, number: str, act: Callable[[], object]) -> None:
    """Let `act()` precede the n-th call of a function."""
    owner, name = pkgutil.resolve_name(target.rpartition(".")[0]), target.rpartition(".")[2]
    whole, count = getattr(owner, name), itertools.count(1)

    def disturbed(*args, **options):
        if next(count) == int(number):
            act()
        return whole(*args, **options)

    setattr(owner, name, disturbed)


def _kill_before(target: str, number: str, seconds: str = "0") -> None:
    def kill():
        if not float(seconds):
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL)).start()

    _before(target, number, kill)


def _hang_before(target: str, number: str, seconds: str = "0") -> None:
    stop = partial(os.kill, os.getpid(), signal.SIGSTOP)
    _before(target, number, partial(time.sleep, float(seconds)) if float(seconds) else stop)


def _fill(pattern: str) -> None:
    """Open /dev/full in place of files of a pattern: a full disk lets one open a file, and refuses what is written."""
    whole = builtins.open

    def full(file, mode="r", *args, **options):
        writes = not isinstance(file, int) and set(mode) & set("wax+")
        if writes and fnmatch.fnmatch(os.fsdecode(file), pattern):
            file, mode = "/dev/full", mode.replace("x", "w")
        return whole(file, mode, *args, **options)

    builtins.open = io.open = full
    Path.open = full


def _skew(seconds: str) -> None:
    """Set the clock of this process ahead, and with it the times of the files that it writes and then renames."""
    ahead = float(seconds)
    read, read_ns, replace, rename = time.time, time.time_ns, os.replace, os.rename

    def at_its_own_time(move):
        def moved(source, *args, **options):
            os.utime(source, (time.time(), time.time()))
            return move(source, *args, **options)

        return moved

    time.time, time.time_ns = (lambda: read() + ahead), (lambda: read_ns() + int(ahead * 1e9))
    os.replace, os.rename = at_its_own_time(replace), at_its_own_time(rename)


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
