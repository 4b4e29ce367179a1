"""Makes a rank's engine out of a configuration: communicator, model, cache, drafter."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch
import torch.distributed as dist

from configs.schema import RunConfig
from runtime.blocks import blocks_for
from runtime.clock import Clock
from runtime.comm import Communicator, Solo
from runtime.costs import Costs
from runtime.drafting.cascade import Cascade
from runtime.drafting.drafter import Drafter, NgramDrafter, NoDrafter, SuffixDrafter
from runtime.drafting.either import Either
from runtime.drafting.model import ModelDrafter
from runtime.drafting.resident import Both, Lookup, Proposer, Recall, Replica
from runtime.drafting.shared import Shared
from runtime.engine import Engine
from runtime.grammar import Grammars
from runtime.graphs import Graphs, capture_on
from runtime.kernels.build import BuildError
from runtime.kv_cache import KVCache, held_dtype
from runtime.messages import Hello
from runtime.model import Model
from runtime.peer_memory import PeerMemory, PeerMemoryError, chosen
from runtime.resident import Resident
from runtime.shared_memory import SharedMemory
from runtime.tokenizer import load_tokenizer
from runtime.torch_group import TorchGroup
from runtime.trial import Trial
from workers.memory import free_memory
from workers.metered import Metered
from workers.models import BuildRefused, Models, load_models

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands: rank of the job, its group's number and ranks, and who shares its host.

    job: a name that no other job on these hosts has. store: torch's key-value store where the launcher has made one;
    otherwise MASTER_ADDR and MASTER_PORT say where the ranks meet.
    """

    rank: int
    group: int
    groups: list[tuple[int, ...]]
    local_rank: int
    local_size: int
    one_host: bool
    job: str
    store: Any = None

    @property
    def members(self) -> tuple[int, ...]:
        return self.groups[self.group]


def build(config: RunConfig, place: Place, load: Callable[..., Models] = load_models) -> tuple[Engine, Hello]:
    """This rank's engine and what it tells the coordinator. load: gives the models, as `load_models` does.

    Raises BuildRefused, ModelError, CannotShard, PeerLost.
    """
    device = choose_device(config.engine.device, place)
    if config.engine.threads is not None or device.type == "cpu":
        torch.set_num_threads(config.engine.threads or max(1, len(os.sched_getaffinity(0)) // place.local_size))
    clock = Clock()
    connected = connect(config, place, device)
    comm = Metered(connected, clock)
    # What the ranks exchange while the int4 model writes a window is time spent drafting.
    inner: Communicator = connected if config.certified else comm
    models = load(config, comm, inner, device, aloud=place.rank == 0)
    verifier = models.verifier
    longest = verifier.max_model_len
    if isinstance(connected, SharedMemory):
        connected.timeout = config.coordination.timeout  # from here on a collective takes a forward at the longest
    num_blocks = size_cache(config, place, device, longest, models.cached)
    held = held_dtype(config.engine.kv_cache_dtype, verifier.dtype)
    cache = KVCache(verifier.cache_shape, num_blocks, config.engine.block_size, held, device)
    budget = config.engine.max_num_batched_tokens
    own = make_drafter(config, models.replica, num_blocks, device)
    drafter: Drafter = Shared(own, inner, device) if comm.size > 1 and config.speculation.width else own
    grammars = Grammars(lambda: load_tokenizer(config.verifier.target), verifier.vocab_size, verifier.end_tokens)
    resident: Resident | None = None
    if lives_on(device):
        proposer = make_proposer(config, own, inner, device)
        graphs = Graphs(capture_on(device) if models.capturable else None)
        resident = Resident(
            models.fast, cache, inner, proposer, graphs, own.lookups + own.chains, config.engine.max_num_seqs, longest, budget
        )
    if config.certified:
        fast = Engine(models.fast, cache, inner, drafter, budget, Clock(), grammars, resident)
        drafter = Cascade(fast, drafter, config.inner_width)
        resident = None  # what lives on the device are the int4 model's rounds
    engine = Engine(verifier, cache, comm, drafter, budget, clock, grammars, resident)
    settings = config.model_dump_json(exclude={"files"}) + models.digest
    hello = Hello(
        rank=place.rank,
        group=place.group,
        digest=blake2b(settings.encode(), digest_size=16).hexdigest(),
        num_blocks=num_blocks,
        max_model_len=longest,
        vocab_size=verifier.vocab_size,
        end_tokens=sorted(verifier.end_tokens),
        fingerprint=fingerprint(config, verifier, longest, len(place.members), device),
        lookups=drafter.lookups,
        chains=drafter.chains,
        even=resident is not None,
        costs=try_out(config, engine, cache, comm, own, drafter, longest) if config.chosen else None,
    )
    return engine, hello


def try_out(
    config: RunConfig, engine: Engine, cache: KVCache, comm: Communicator, own: Drafter, drafter: Drafter, longest: int
) -> Costs:
    """What rounds take, for whoever chooses numbers of drafts."""
    seqs = config.engine.max_num_seqs
    most = min(config.engine.max_num_batched_tokens, seqs * (config.width + 1))
    trial = Trial(engine, cache, comm, seqs, most, longest)
    if isinstance(own, Either) and not config.certified:  # of the two, it is the model whose time counts
        return trial.run(Shared(own.chain, comm, cache.device), own.chain.source)
    return trial.run(drafter if drafter.chains else None)


def fingerprint(config: RunConfig, verifier: Model, longest: int, ranks: int, device: torch.device) -> str:
    """Hex, the same wherever the same request gets the same tokens: of the model, its arithmetic and what does it.

    What drafts, how rounds are made and how many groups there are decide nothing and are left out; so is the number of
    ranks where the model says that it changes no bit. Certified output has the fingerprint of what it equals, the 16-bit
    model's.
    """
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    arithmetic = json.dumps(config.verifier.arithmetic, sort_keys=True)
    split = ("any" if verifier.ranks_alike else ranks, config.engine.reproducible)
    dtypes = [str(verifier.dtype), config.engine.kv_cache_dtype]
    parts = [verifier.digest, arithmetic, *dtypes, longest, split, device.type, kind, torch.__version__, release()]
    return blake2b("\0".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def release() -> str:
    """The version of this program; "source" where it is not installed."""
    try:
        return version("quasar-runtime")
    except PackageNotFoundError:
        return "source"


def choose_device(wanted: str, place: Place) -> torch.device:
    """The device of this rank: its own GPU where there is one, unless told otherwise."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BuildRefused("engine.device is cuda, and torch sees no CUDA device; set it to cpu or auto")
    if place.local_rank >= torch.cuda.device_count():
        raise BuildRefused(
            f"rank {place.rank} is number {place.local_rank} on its host, which has {torch.cuda.device_count()} GPUs; "
            "start at most one rank per GPU"
        )
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    return device


def connect(config: RunConfig, place: Place, device: torch.device) -> Communicator:
    """How this rank talks to its group: memory on one host, NCCL between GPUs, gloo between hosts."""
    members, rank = place.members, place.members.index(place.rank)
    patience = config.coordination.startup_timeout  # ranks may load their models minutes apart, and try them together
    if len(members) == 1:
        return Solo()
    if device.type == "cpu" and place.one_host:
        try:
            return SharedMemory(f"{place.job}-{place.group}", rank, len(members), patience)
        except BuildError as error:
            log.warning("falling back to gloo between the ranks of this host, which is many times slower: %s", error)
    if device.type == "cpu" and (interface := interface_to(os.environ.get("MASTER_ADDR", ""))):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=place.store,
        init_method=None if place.store is not None else "env://",
        rank=place.rank,
        world_size=sum(map(len, place.groups)),
        timeout=timedelta(seconds=patience),
    )
    made = [dist.new_group(list(ranks), timeout=timedelta(seconds=patience)) for ranks in place.groups]
    own, wanted, peers = made[place.group], config.parallel.all_reduce, None
    try:
        peers = PeerMemory(own, device) if chosen(wanted, device, place.one_host) else None
    except PeerMemoryError as error:
        if wanted == "symmetric":
            raise BuildRefused(str(error)) from error
        log.warning("falling back to NCCL for small sums: %s", error)
    return TorchGroup(own, peers, loose=not config.engine.reproducible)


def interface_to(host: str) -> str | None:
    """The network interface by which this host reaches another, or itself; gloo takes loopback if nobody tells it."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # of UDP: finds the route and sends nothing
            address = probe.getsockname()[0]
    except OSError:
        return None
    names = (name for name, addresses in psutil.net_if_addrs().items() if address in {a.address for a in addresses})
    return next(names, None)


def size_cache(config: RunConfig, place: Place, device: torch.device, longest: int, models: list[Model]) -> int:
    """Blocks of this rank's KV cache, over all of its models."""
    engine = config.engine
    held = [(m.cache_shape, held_dtype(engine.kv_cache_dtype, m.dtype)) for m in models]
    if engine.kv_cache_dtype != "auto" and any(shape.head_dim % 4 for shape, _ in held):
        raise BuildRefused("engine.kv_cache_dtype: heads whose width is no multiple of 4 aren't held in eight bits; use auto")
    each = sum(KVCache.bytes_per_block(shape, engine.block_size, dtype) for shape, dtype in held)
    if engine.kv_cache_memory is not None:
        blocks = engine.kv_cache_memory // each
        if blocks == 0:
            raise BuildRefused(f"engine.kv_cache_memory {engine.kv_cache_memory} holds no block of {each} bytes; raise it")
        return blocks
    sharing = place.local_size if device.type == "cpu" else 1
    affordable = free_memory(device) // 2 // sharing // each
    return max(1, min(engine.max_num_seqs * blocks_for(longest, engine.block_size), affordable))


def make_drafter(config: RunConfig, replica: Model | None, num_blocks: int, device: torch.device) -> Drafter:
    """The drafter that `speculation.method` names."""
    speculation, engine = config.speculation, config.engine
    shortest, longest = speculation.prompt_lookup_min, speculation.prompt_lookup_max
    if speculation.width == 0:
        return NoDrafter()
    if speculation.method == "ngram":
        return NgramDrafter(shortest, longest)
    lookup = SuffixDrafter(shortest, longest)
    if speculation.method == "suffix" or replica is None:
        return lookup
    held = held_dtype(engine.kv_cache_dtype, replica.dtype)
    cache = KVCache(replica.cache_shape, num_blocks, engine.block_size, held, device)
    if speculation.method == "model":
        return ModelDrafter(replica, cache, engine.max_num_batched_tokens)
    return Either(lookup, ModelDrafter(replica, cache, engine.max_num_batched_tokens, lookup.lookups + 1))


def lives_on(device: torch.device) -> bool:
    """Whether rounds live on the device: where a launch costs more than a few rows of padding do."""
    return device.type == "cuda"


def make_proposer(config: RunConfig, own: Drafter, comm: Communicator, device: torch.device) -> Proposer | None:
    """Who drafts for rounds on the device: what does on the host, in its form for the device."""
    speculation = config.speculation
    lookup = Lookup(speculation.prompt_lookup_min, speculation.prompt_lookup_max)

    def recall(drafter: SuffixDrafter) -> Recall:
        return Recall(drafter, lookup, config.engine.max_num_seqs + comm.size, speculation.width, device)

    if isinstance(own, ModelDrafter):
        return Replica(own, comm)
    if isinstance(own, Either):
        return Both(recall(own.lookup), Replica(own.chain, comm))
    if isinstance(own, SuffixDrafter):
        return recall(own)
    return None if isinstance(own, NoDrafter) else lookup
