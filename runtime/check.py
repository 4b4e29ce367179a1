"""Which rows of logits are about which tokens: a sequence's share of a check."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Check:
    """Consecutive rows of logits of one sequence: row i is about the token at `position + i`, of `count` rows.

    drafts: tokens after the committed ones. A row about a position beyond the committed tokens decides it; one before is
    about a token of the prompt, and only its log-probability is wanted.
    """

    sequence: Sequence
    position: int
    count: int
    drafts: list[int]

    @property
    def num_known(self) -> int:
        """Leading rows that decide nothing."""
        return min(self.count, max(0, self.sequence.num_committed - self.position))


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a round's checks that decide, laid end to end, as arrays [R].

    checks: of all rows; owners: a row's index into them; positions: of the token it decides; places: its row of logits
    (all int64). temperatures: float32; seeds: int64. num_logits: rows of logits in all.
    """

    checks: list[Check]
    owners: NDArray[np.int64]
    positions: NDArray[np.int64]
    places: NDArray[np.int64]
    temperatures: NDArray[np.float32]
    seeds: NDArray[np.int64]
    num_logits: int

    @property
    def plain(self) -> bool:
        """Whether all that is wanted of the logits is each row's best token, by the rule alone."""
        return len(self.owners) == self.num_logits and all(check.sequence.sampling.plain for check in self.checks)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """temperatures, seeds and positions on a device."""
        temperatures, seeds, positions = (
            torch.from_numpy(array).to(device) for array in (self.temperatures, self.seeds, self.positions)
        )
        return temperatures, seeds, positions

    @classmethod
    def of(cls, checks: list[Check]) -> Rows:
        counts = np.array([check.count for check in checks], np.int64)
        known = np.array([check.num_known for check in checks], np.int64)
        starts = np.array([check.position for check in checks], np.int64) + known
        deciding = counts - known
        owners = np.repeat(np.arange(len(checks)), deciding)
        within = np.arange(len(owners)) - np.repeat(np.cumsum(deciding) - deciding, deciding)
        return cls(
            checks,
            owners,
            starts[owners] + within,
            (np.cumsum(counts) - counts + known)[owners] + within,
            np.array([check.sequence.sampling.temperature for check in checks], np.float32)[owners],
            np.array([check.sequence.sampling.seed for check in checks], np.int64)[owners],
            int(counts.sum()),
        )
