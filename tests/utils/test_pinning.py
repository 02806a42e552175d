"""The division of a machine's cores among its ranks, on made-up machines, and the binding of a real process."""

import os
import threading
from types import SimpleNamespace

import pytest
import torch

from ajepa.data import reader
from ajepa.utils import cores, devices, pinning
from ajepa.utils.pinning import Place, pin, place, share

HOST = "node0"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes a machine: processor c of socket s is core c, and its hyperthread is c + the number of cores."""
    monkeypatch.setattr(pinning, "SYSTEM", tmp_path / "system")
    monkeypatch.setattr(pinning, "PCI", tmp_path / "pci")
    monkeypatch.setattr(pinning, "THREADS", tmp_path / "task")
    monkeypatch.setattr(cores, "QUOTAS", ())
    monkeypatch.setattr(cores, "sharing", None)

    def write(path: str, text: object) -> None:
        (tmp_path / "system" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "system" / path).write_text(f"{text}\n")

    def make(sockets=2, nodes=2, count=32, threads=2, offline=()):
        """A machine of `count` cores; `offline` processors have neither a topology nor a node."""
        cpus = [cpu for cpu in range(count * threads) if cpu not in offline]
        for cpu in cpus:
            core = cpu % count
            siblings = [core + count * i for i in range(threads) if core + count * i in cpus]
            write(f"cpu/cpu{cpu}/topology/thread_siblings_list", ",".join(map(str, siblings)))
            write(f"cpu/cpu{cpu}/topology/physical_package_id", core * sockets // count)
        for node in range(nodes):
            own = [cpu for cpu in cpus if cpu % count * nodes // count == node]
            write(f"node/node{node}/cpulist", ",".join(map(str, own)))
        write("node/possible", "0-7")  # other files lie beside the nodes
        return set(cpus)

    return make


def shares(cpus: set[int], nodes: list[int]) -> list[set[int]]:
    return [share(cpus, nodes, rank) for rank in range(len(nodes))]


def both(first: int, end: int, threads: int = 32) -> set[int]:
    """The processors of cores [first, end), with their hyperthreads."""
    return {*range(first, end), *range(first + threads, end + threads)}


def test_the_ranks_of_a_socket_divide_its_cores(machine):
    cpus = machine()
    assert shares(cpus, [0, 0, 0, 0, 1, 1, 1, 1]) == [both(4 * rank, 4 * rank + 4) for rank in range(8)]
    # GPUs are not always numbered by node, and a run may use some of them.
    assert shares(cpus, [1, 0, 1]) == [both(16, 24), both(0, 16), both(24, 32)]
    assert shares(cpus, [1, 1]) == [both(16, 24), both(24, 32)]
    thirds = shares(cpus, [0, 0, 0])
    assert [len(own) for own in thirds] == [10, 10, 12] and set.union(*thirds) == both(0, 16)


def test_no_core_of_a_socket_with_more_nodes_than_gpus_is_left_over(machine):
    cpus = machine(nodes=8)  # four in each socket, of four cores each
    assert shares(cpus, [1, 3, 5, 7]) == [both(0, 8), both(8, 16), both(16, 24), both(24, 32)]
    assert shares(cpus, [3, 1, 1, 1]) == [both(12, 16), both(0, 4), both(4, 8), both(8, 12)]


@pytest.mark.parametrize("gpus", [[-1] * 4, [0, 0, 0, 0]])
def test_without_nodes_the_cores_are_divided_evenly(machine, gpus):
    cpus = machine(sockets=1, nodes=0, count=6)
    assert shares(cpus, gpus) == [both(0, 1, 6), both(1, 3, 6), both(3, 4, 6), both(4, 6, 6)]


def test_one_gpu_without_a_node_divides_all_cores_evenly_in_the_order_of_nodes(machine):
    assert shares(machine(), [1, 0, -1, 0]) == [both(24, 32), both(8, 16), both(0, 8), both(16, 24)]


def test_virtual_processors_that_are_sockets_of_their_own_are_divided_by_node(machine):
    cpus = machine(sockets=8, count=8, threads=1)
    assert shares(cpus, [0, 0, 1, 1]) == [{0, 1}, {2, 3}, {4, 5}, {6, 7}]


def test_a_container_divides_what_it_may_use(machine):
    machine()
    both_sockets = {*range(12, 20), *range(44, 52)}
    assert shares(both_sockets, [0, 0, 1, 1]) == [both(12, 14), both(14, 16), both(16, 18), both(18, 20)]
    one_socket = both(0, 4)
    assert shares(one_socket, [0, 0, 1, 1]) == [both(0, 1), both(1, 2), both(2, 3), both(3, 4)]
    halves = {0, 1, 2, 34}  # of core 2 both hyperthreads, of the others one
    assert shares(halves, [0, 0]) == [{0}, {1, 2, 34}]
    assert shares({0, 32, 1}, [0, 0, 0]) == [set()] * 3  # three processors, but two cores


def test_offline_processors_are_nobody_s(machine):
    cpus = machine(offline=(1, 33, 34))  # a whole core, and a hyperthread of the next
    assert shares(cpus, [0, 0, 0, 1]) == [
        {0, *range(2, 6), 32, *range(35, 38)},
        both(6, 11),
        both(11, 16),
        both(16, 32),
    ]


def test_a_place_names_the_node_of_the_gpu(machine, monkeypatch):
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xDC, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    assert place(torch.device("cpu")).node == place(torch.device("cuda", 3)).node == -1
    folder = pinning.PCI / "0000:dc:00.0"
    folder.mkdir(parents=True)
    for text, node in (("1\n", 1), ("-1\n", -1)):
        (folder / "numa_node").write_text(text)
        here = place(torch.device("cuda", 3))
        assert here.node == node
        assert here.cpus == sorted(os.sched_getaffinity(0))
        assert here.host == place(torch.device("cpu")).host


@pytest.fixture
def bound(monkeypatch):
    """What the process has been bound to, without binding it."""
    calls: list[set[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cpus: calls.append(cpus))
    return calls


def places(cpus: set[int], nodes: list[int], host: str = HOST) -> list[Place]:
    return [Place(host, sorted(cpus), node) for node in nodes]


def test_a_rank_is_bound_to_its_share(machine, bound):
    cpus = machine()
    two_machines = places(cpus, [0, 0, 1, 1], "other") + places(cpus, [0, 0, 1, 1])
    assert pin(two_machines, 7) == "rank 7: cores 24-31, 56-63 (NUMA node 1)"
    assert bound == [both(24, 32)]
    assert cores.sharing == 1
    assert pin(places({0, 1, 2, 3}, [-1, -1], HOST), 1) == "rank 1: cores 2-3 (NUMA node 0)"


@pytest.mark.parametrize(("own", "line", "sharing"), [
    ([both(0, 8), both(8, 16), both(16, 32)], "rank 0: cores 0-7, 32-39 (NUMA node 0), bound by the launcher", 1),
    ([both(0, 16), both(0, 16), both(16, 32)], "rank 0: cores 0-15, 32-47 (NUMA node 0), bound by the launcher", 2),
])  # fmt: skip
def test_a_binding_of_the_launcher_stays(machine, bound, own, line, sharing):
    machine()
    assert pin([Place(HOST, sorted(cpus), 0) for cpus in own], 0) == line
    assert bound == [] and cores.sharing == sharing


def test_ranks_stay_unbound_where_that_is_better(machine, bound, tmp_path, monkeypatch):
    cpus = machine()
    assert pin(places(cpus, [0, 1]), 0, wanted=False) == "rank 0: cores 0-63 (NUMA nodes 0, 1)"
    assert cores.sharing == 2
    assert pin(places({0, 32}, [0, 0]), 1) == "rank 1: cores 0, 32 (NUMA node 0), not bound"
    assert pin(places(set(), [-1, -1]), 1) == "rank 1: cores unknown, not bound"
    assert cores.sharing == 2
    assert pin(places(cpus, [0]), 0) == "rank 0: cores 0-63 (NUMA nodes 0, 1)"
    assert cores.sharing == 1
    (tmp_path / "cpu.max").write_text("3200000 100000")
    monkeypatch.setattr(cores, "QUOTAS", (str(tmp_path / "cpu.max"),))
    assert pin(places(cpus, [0, 1]), 0).endswith(", not bound")
    assert bound == []
    assert pin(places(set(range(16)), [0, 0]), 1) == "rank 1: cores 8-15 (NUMA node 0)"  # the quota is no limit there

    def forbidden(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", forbidden)
    line = "rank 1: cores 0-15 (NUMA node 0), not bound: Operation not permitted"
    assert pin(places(set(range(16)), [0, 0]), 1) == line
    assert cores.sharing == 2


@pytest.mark.parametrize(("bound_to", "sharing", "quota", "threads"), [
    (64, None, None, 8),  # eight ranks that share all cores
    (8, 1, None, 8),  # each has cores of its own
    (32, 4, None, 8),  # the four of a node share its cores
    (8, 1, "3200000", 4),  # the quota of 32 cores is that of all eight
    (64, 8, "3200000", 4),
    (64, None, "150000", 1),
])  # fmt: skip
def test_threads_are_counted_by_the_cores_that_a_rank_has(bound_to, sharing, quota, threads, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(bound_to)))
    monkeypatch.setattr(cores, "sharing", sharing)
    (tmp_path / "cpu.max").write_text(f"{quota or 'max'} 100000")
    monkeypatch.setattr(cores, "QUOTAS", (str(tmp_path / "cpu.max"),))
    assert reader.default_threads() == threads
    monkeypatch.setattr(devices, "free_cores", lambda _: float(bound_to))
    monkeypatch.setattr(devices.torch, "get_num_threads", lambda: 64)
    assert devices.choose_threads(0) == bound_to / (sharing or 8)


def bind_one_of_two(argv):
    """The body of `test_all_threads_of_a_rank_are_bound`, in a process of its own: rank, and one processor of each."""
    rank, *cpus = map(int, argv)
    os.sched_setaffinity(0, cpus)
    begun, leave = threading.Event(), threading.Event()
    earlier = threading.Thread(target=lambda: begun.set() or leave.wait())
    earlier.start()
    begun.wait()
    here = place(torch.device("cpu"))
    line = pin([here, here], rank)
    later = threading.Thread(target=leave.wait)
    later.start()
    masks = [os.sched_getaffinity(thread) for thread in (0, earlier.native_id, later.native_id)]
    leave.set()
    assert masks == [{cpus[rank]}] * 3, masks
    assert line.startswith(f"rank {rank}: cores {cpus[rank]}")
    assert cores.cores() == reader.default_threads() == 1
    return 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_all_threads_of_a_rank_are_bound(forks, tmp_path):
    own = [str(core.cpus[0]) for core in pinning._cores(os.sched_getaffinity(0))][:2]
    if len(own) < 2:
        pytest.skip("two ranks need two cores, and this process may use one")
    log = tmp_path / "log"
    for rank in "01":
        status = forks.run([rank, *own], log, call="test_pinning:bind_one_of_two", LOCAL_WORLD_SIZE="2")
        assert status == 0, log.read_text()
