"""Drafting for a group: each rank drafts for the slots it owns, and one exchange tells everybody."""

from __future__ import annotations

import numpy as np
import torch

from runtime.comm import Communicator
from runtime.drafting.drafter import Draft, Drafter
from runtime.scheduler import Work
from runtime.sequence import Sequence

END = -1  # no token, and so the end of a draft


class Shared:
    """A drafter of which every rank has one, and of whose work each does its part.

    The ranks propose in step and are given the same drafts. Whose part a sequence is depends on its slot alone, so that a
    rank's drafter sees a sequence from its start to its end. device: from which the ranks exchange.
    """

    def __init__(self, drafter: Drafter, comm: Communicator, device: torch.device) -> None:
        self.lookups, self.chains = drafter.lookups, drafter.chains
        self._drafter = drafter
        self._comm = comm
        self._device = device

    def propose(self, works: list[Work]) -> list[Draft]:
        if not works:
            return []
        owners = np.array([work.sequence.slot % self._comm.size for work in works], np.int64)
        mine = np.flatnonzero(owners == self._comm.rank).tolist()
        table = np.full((len(works), 1 + max(work.num_drafts for work in works)), END, np.int32)
        for row, draft in zip(mine, self._drafter.propose([works[row] for row in mine]), strict=True):
            table[row, 0] = draft.source
            table[row, 1 : 1 + len(draft.tokens)] = draft.tokens
        tables = self._comm.all_gather(torch.from_numpy(table).to(self._device)).cpu().numpy()
        return [Draft(tokens, source) for source, *tokens in tables[owners, np.arange(len(works))].tolist()]

    def rewind(self, sequence: Sequence) -> None:
        self._drafter.rewind(sequence)

    def release(self, sequence: Sequence) -> None:
        self._drafter.release(sequence)
