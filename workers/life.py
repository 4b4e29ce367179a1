"""A rank from its first breath to its exit code: every way it can end is named here."""

from __future__ import annotations

import subprocess
import sys
import traceback

import torch
import torch.distributed as dist

from configs import exits
from configs.schema import RunConfig
from runtime.checkpoint import ModelError
from runtime.comm import PeerLost
from runtime.grammar import GrammarError
from runtime.messages import Failure
from runtime.shard import CannotShard
from runtime.shared_memory import SharedMemoryError
from runtime.verify import NotANumber
from runtime.wire import BadMessage
from workers.build import Place, build
from workers.heartbeat import Watchdog
from workers.models import BuildRefused
from workers.rank import Rank
from workers.transport import Client, TransportError


def live(config: RunConfig, place: Place, endpoint: str, child: subprocess.Popen[bytes] | None) -> int:
    """Loads, serves, and returns the exit code. `child` is the coordinator where this rank started it."""
    watchdog = Watchdog(endpoint, place.rank, config.coordination, child)
    try:
        client = Client(endpoint, b"rank-%d" % place.rank, config.coordination.curve)
    except TransportError as error:
        return say(place, exits.REFUSED, error)
    watchdog.start()
    with client:
        try:
            engine, hello = build(config, place)
            client.send(hello)
            leads = place.rank == place.members[0]
            stop = Rank(place.rank, leads, config.coordination.merge, engine, client).run()
            code = stop.code
        except (BuildRefused, ModelError, CannotShard) as error:
            code = fail(client, place, exits.REFUSED, error)
        except GrammarError as error:  # the coordinator has compiled it: its files or versions are others than these
            code = fail(client, place, exits.DISAGREED, error)
        except (PeerLost, SharedMemoryError, BadMessage, dist.DistError) as error:
            code = fail(client, place, exits.LOST, error)
        except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError, NotANumber) as error:
            code = fail(client, place, exits.DEVICE, error)
        except Exception as error:
            traceback.print_exc()
            code = fail(client, place, exits.UNFORESEEN, error)
        watchdog.stop()
    if child is not None:
        return child.wait() or code
    return code


def fail(client: Client, place: Place, code: int, error: BaseException) -> int:
    client.send(Failure(place.rank, code, f"{type(error).__name__}: {error}"))
    return say(place, code, error)


def say(place: Place, code: int, error: BaseException) -> int:
    print(f"quasar: rank {place.rank} ends with exit code {code}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return code
