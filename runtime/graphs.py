"""Doing the same work again: captured once as a CUDA graph, replayed from then on."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

log = logging.getLogger(__name__)

MOST = 48  # graphs; each keeps its kernels' arguments, and all share one pool for what lives only inside of them

Work = Callable[[], None]
Capture = Callable[[Work], Work]  # records work without doing it; what it returns does it


class Graphs:
    """Runs work by its key. All that a piece of work reads and writes are tensors that stay where they are.

    The first run of a key is done as it is, so that kernels are compiled; the second is captured, and from then on it is
    replayed. Nothing is captured before it is needed, and at most `most` graphs are kept, those used last. What cannot be
    captured goes on as it is, with a warning. Ranks of a group that run the same keys in the same order capture the
    same graphs at the same moments, so exchanges inside them meet. capture: None does everything as it is.
    """

    def __init__(self, capture: Capture | None, most: int = MOST) -> None:
        self._capture = capture
        self._most = most
        self._known: set[Hashable] = set()
        self._refused: set[Hashable] = set()
        self._replays: OrderedDict[Hashable, Work] = OrderedDict()

    def run(self, key: Hashable, work: Work) -> None:
        replay = self._replays.get(key)
        if replay is None and key in self._known and key not in self._refused:
            replay = self._captured(key, work)
        self._known.add(key)
        if replay is None:
            work()
            return
        self._replays.move_to_end(key)
        replay()

    def _captured(self, key: Hashable, work: Work) -> Work | None:
        if self._capture is None:
            return None
        try:
            replay = self._capture(work)
        except RuntimeError as error:  # out of memory too
            self._refused.add(key)
            log.warning("a round of the shape %s cannot be captured and goes on launch by launch: %s", key, error)
            return None
        self._replays[key] = replay
        if len(self._replays) > self._most:
            self._replays.popitem(last=False)
        return replay


def capture_on(device: torch.device) -> Capture | None:
    """How work on a device is captured: CUDA graphs that share one memory pool; None where there are none."""
    if device.type != "cuda":
        return None
    pool = torch.cuda.graph_pool_handle()

    def capture(work: Work) -> Work:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        try:
            # Other threads of a rank, such as its watchdog's, may go about their business meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                work()
        finally:
            torch.cuda.set_stream(stream)  # a capture that fails may leave its own behind
        return graph.replay

    return capture
