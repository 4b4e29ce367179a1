"""Exchanges between real processes: exact sums, the same bits everywhere, and a named end when a peer is gone."""

import datetime
import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from runtime.comm import SUMMED, Communicator, PeerLost, Solo
from runtime.kernels.build import BuildError, load_extension
from runtime.peer_memory import PeerMemoryError, chosen
from runtime.shared_memory import SharedMemory, SharedMemoryError
from runtime.torch_group import WHOLE, TorchGroup
from tests.branches import branches

GATHERED = [*SUMMED, torch.int64, torch.int32, torch.uint8, torch.bool, torch.float64, torch.float8_e4m3fn]


def unique() -> str:
    return uuid.uuid4().hex


def shared(name: str, rank: int, size: int, timeout: float = 60.0) -> Communicator:
    return SharedMemory(name, rank, size, timeout=timeout, capacity=64 << 10)


def gloo(port: str, rank: int, size: int, timeout: float = 60.0) -> Communicator:
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size,
        timeout=datetime.timedelta(seconds=timeout),
    )  # fmt: skip
    assert dist.group.WORLD is not None
    return TorchGroup(dist.group.WORLD)


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def draw(rng: random.Random, dtype: torch.dtype) -> Tensor:
    shape = [rng.randrange(0, 6) for _ in range(rng.randrange(0, 3))] + [rng.choice([1, 3, 17, 256, 1000])]
    if rng.random() < 0.02:
        shape = [rng.randrange(20_000, 90_000)]  # in pieces
    if rng.random() < 0.05:
        shape = []
    generator = torch.Generator().manual_seed(rng.randrange(1 << 40))
    x = torch.randn(shape, generator=generator) * 10 ** rng.uniform(-3, 3)
    return x.to(dtype) if dtype.is_floating_point else (x * 10).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    def raw(x: Tensor) -> Tensor:
        return x.contiguous().view(-1).view(torch.uint8)

    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(raw(a), raw(b)))


def exchange_at_random(
    make: Callable[..., Communicator], name: str, rank: int, size: int, seed: int, rounds: int
) -> None:
    """Every rank draws every rank's tensors, so it knows what must come."""
    torch.set_num_threads(1)
    comm = make(name, rank, size)
    choose = random.Random(seed)
    own = [random.Random(f"{seed} {r}") for r in range(size)]
    for _ in range(rounds):
        kind = choose.choice(["reduce", "reduce", "gather", "barrier"])
        if kind == "barrier":
            comm.barrier()
            continue
        dtype = choose.choice(SUMMED if kind == "reduce" else GATHERED)
        state = choose.getrandbits(60)
        parts = []
        for r in range(size):
            shape_of = random.Random(state)
            x = draw(shape_of, dtype)
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(own[r].randrange(1 << 40)))
            parts.append((x.double() * (1 + noise)).to(torch.int32 if dtype == torch.uint8 else dtype).to(dtype))
        if choose.random() < 0.2 and parts[0].dim() >= 2:
            parts = [p.transpose(0, 1) for p in parts]
        before = parts[rank].clone()
        if kind == "gather":
            got = comm.all_gather(parts[rank])
            assert got.shape == (size, *before.shape) and all(same_bits(g, p) for g, p in zip(got, parts, strict=True))
        else:
            wanted = choose.choice([None, *SUMMED])
            got = comm.all_reduce(parts[rank], wanted)
            assert same_bits(got, branches([p.float() for p in parts]).to(wanted or dtype))
            exact = sum(p.double() for p in parts)
            info = torch.finfo(got.dtype)
            room = size * 2**-23 * sum(p.double().abs() for p in parts) + info.eps * exact.abs()
            finite = exact.abs() < info.max
            assert bool(((got.double() - exact).abs() <= room + info.tiny)[finite].all())
        assert same_bits(parts[rank], before)
    comm.barrier()
    comm.close()
    comm.close()


def spawn(function: Callable[..., None], size: int, *arguments: object) -> None:
    mp.start_processes(_enter, args=(function, size, *arguments), nprocs=size, start_method="spawn")


def _enter(rank: int, function: Callable[..., None], size: int, *arguments: object) -> None:
    function(*arguments[:2], rank, size, *arguments[2:])
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    try:
        load_extension()
    except BuildError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("size", "rounds"), [(2, 2500), (5, 200)])
def test_shared_memory_sums_and_gathers_exactly(size: int, rounds: int, seed: int) -> None:
    name = unique()
    spawn(exchange_at_random, size, shared, name, seed, rounds)
    assert not list(Path("/dev/shm").glob(f"*{name}*"))


@pytest.mark.parametrize(("size", "rounds"), [(2, 100), (3, 60)])
def test_gloo_sums_and_gathers_exactly(size: int, rounds: int, seed: int) -> None:
    spawn(exchange_at_random, size, gloo, free_port(), seed, rounds)


def place_of_an_element(make: Callable[..., Communicator], name: str, rank: int, size: int, seed: int) -> None:
    comm = make(name, rank, size)
    x = torch.randn(5000, generator=torch.Generator().manual_seed(seed + rank)).bfloat16()
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(seed))
    whole = comm.all_reduce(x)
    assert torch.equal(comm.all_reduce(x[order]), whole[order])
    assert torch.equal(comm.all_reduce(x[37:1038]), whole[37:1038])
    large = torch.cat([x] * 60)  # by shares
    assert large.nbytes > WHOLE and torch.equal(comm.all_reduce(large), torch.cat([whole] * 60))
    seen = comm.all_gather(whole)
    assert all(torch.equal(seen[r], whole) for r in range(size))
    comm.close()


@pytest.mark.parametrize("make", [shared, gloo])
def test_a_sum_does_not_depend_on_the_place(make: Callable[..., Communicator], seed: int) -> None:
    spawn(place_of_an_element, 3, make, unique() if make is shared else free_port(), seed)


@pytest.mark.parametrize("wanted", ["auto", "nccl", "symmetric"])
@pytest.mark.parametrize(
    ("kind", "one_host", "readable", "possible"),
    [("cuda", True, True, True), ("cuda", True, False, False), ("cuda", False, True, False), ("cpu", True, True, False)],
)
def test_peers_memory_is_chosen_where_it_can_be(
    wanted: str, kind: str, one_host: bool, readable: bool, possible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice alone: the memory itself takes several GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, peer: device != peer and (readable or peer != 3))
    device = torch.device(kind, 1) if kind == "cuda" else torch.device(kind)
    if wanted == "symmetric" and not possible:
        with pytest.raises(PeerMemoryError, match="set it to auto or nccl"):
            chosen(wanted, device, one_host)
    else:
        assert chosen(wanted, device, one_host) == (possible and wanted != "nccl")


def librarys(make: Callable[..., Communicator], name: str, rank: int, size: int, seed: int) -> None:
    plain = make(name, rank, size)
    assert isinstance(plain, TorchGroup)
    loose = TorchGroup(plain.group, loose=True)
    for dtype in SUMMED:
        for shape in (300, 40), (300, 4000):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + rank)).to(dtype)
            got, exact = loose.all_reduce(x.t(), torch.float32), plain.all_reduce(x.t().double().float())
            torch.testing.assert_close(got, exact, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    with pytest.raises(ValueError, match="int32"):
        loose.all_reduce(torch.ones(3, dtype=torch.int32), torch.float32)


def test_a_library_adds_where_order_does_not_matter(seed: int) -> None:
    spawn(librarys, 2, gloo, free_port(), seed)


def test_solo_is_a_group_of_one() -> None:
    comm, x = Solo(), torch.arange(4.0)
    assert torch.equal(comm.all_reduce(x), x) and comm.all_reduce(x) is not x
    assert comm.all_gather(x).shape == (1, 4)
    with pytest.raises(ValueError, match="int64"):
        comm.all_reduce(torch.arange(4))


def peer(code: str, *arguments: object) -> "subprocess.Popen[str]":
    start = "import os, signal, sys, time, torch\nfrom tests.test_comm import *\nname = sys.argv[1]\n"
    return subprocess.Popen(
        [sys.executable, "-c", start + code, *map(str, arguments)], cwd=Path(__file__).parent.parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_killed_peer_ends_in_peer_lost(seed: int) -> None:
    name = unique()
    other = peer("c = shared(name, 1, 2)\nwhile True: c.all_reduce(torch.ones(5))", name)
    comm = SharedMemory(name, 0, 2, timeout=20.0, capacity=64 << 10)
    for _ in range(random.Random(seed).randrange(100)):
        assert comm.all_reduce(torch.ones(5)).sum() == 10
    comm.timeout = 1.0
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    start = time.monotonic()

    def go_on() -> None:  # the peer may have given its share of one more
        for _ in range(3):
            comm.all_reduce(torch.ones(5))

    with pytest.raises(PeerLost, match="rank 1 did not come within 1 s"):
        go_on()
    assert time.monotonic() - start < 2.0
    with pytest.raises(PeerLost, match="rank 1"):  # and it stays so
        comm.barrier()
    other.communicate()


def test_a_peer_that_leaves_is_missed_at_once() -> None:
    name = unique()
    other = peer("c = shared(name, 1, 2); c.barrier(); c.close(); time.sleep(5)", name)
    comm = shared(name, 0, 2)
    comm.barrier()
    start = time.monotonic()
    with pytest.raises(PeerLost, match="rank 1 left"):
        comm.barrier()
    assert time.monotonic() - start < 4.0
    other.kill()
    other.communicate()


def test_ranks_that_exchange_different_things_are_told() -> None:
    name = unique()
    other = peer("c = shared(name, 1, 2)\ntry: c.all_reduce(torch.ones(6))\nexcept PeerLost as e: print(e)", name)
    comm = shared(name, 0, 2)
    with pytest.raises(PeerLost, match="different things"):
        comm.all_reduce(torch.ones(5))
    assert "rank" in other.communicate()[0]


def test_signals_are_handled_while_waiting() -> None:
    name = unique()
    code = (
        "def stop(*_): raise SystemExit(5)\n"
        "signal.signal(signal.SIGTERM, stop)\nc = shared(name, 1, 2); print('here', flush=True); c.barrier()"
    )
    other = peer(code, name)
    comm = shared(name, 0, 2)
    assert other.stdout is not None and other.stdout.readline() == "here\n"
    time.sleep(0.1)
    other.terminate()
    assert other.wait(timeout=5) == 5
    other.communicate()
    comm.close()


def test_a_stale_file_is_replaced(seed: int) -> None:
    name = unique()
    dead = peer("c = SharedMemory(name, 0, 2, timeout=60.0, capacity=64 << 10)", name)
    path = Path(f"/dev/shm/quasar-{os.getuid()}-{name}")
    try:
        while not path.exists():
            assert dead.poll() is None
            time.sleep(0.01)
        dead.kill()
        dead.communicate()
        early = peer("c = shared(name, 1, 2); print(c.all_reduce(torch.ones(2)).sum().item())", name)
        time.sleep(random.Random(seed).uniform(0, 4))  # before or after the other rank finds the stale file
        assert shared(name, 0, 2).all_reduce(torch.ones(2)).sum() == 4
        assert early.communicate()[0].strip() == "4.0"
        assert not path.exists()
    finally:
        path.unlink(missing_ok=True)


def test_a_group_that_never_completes_ends(tmp_path: Path) -> None:
    with pytest.raises(PeerLost, match=r"ranks 1, 2 did not attach .* within 0.3 s"):
        SharedMemory(unique(), 0, 3, timeout=0.3, directory=str(tmp_path))
    assert not list(tmp_path.iterdir())
    with pytest.raises(PeerLost, match="rank 0 did not make"):
        SharedMemory(unique(), 1, 3, timeout=0.3, directory=str(tmp_path))


def test_missing_or_small_memory_is_named(tmp_path: Path) -> None:
    for rank in (0, 1):
        with pytest.raises(SharedMemoryError, match="nowhere"):
            SharedMemory(unique(), rank, 2, timeout=0.3, directory=str(tmp_path / "nowhere"))
    with pytest.raises(SharedMemoryError, match="--shm-size"):
        SharedMemory(unique(), 0, 31, timeout=0.3, capacity=1 << 42)
    assert not list(Path("/dev/shm").glob(f"quasar-*.{os.getpid()}"))


def test_gloo_misses_a_dead_peer() -> None:
    port = free_port()
    other = peer("c = gloo(name, 1, 2); c.barrier(); os._exit(1)", port)
    code = "c = gloo(name, 0, 2, 5.0)\nc.barrier()\ntry: c.all_reduce(torch.ones(3))\nexcept PeerLost: print('lost')"
    assert "lost" in peer(code, port).communicate(timeout=60)[0]
    other.communicate()
