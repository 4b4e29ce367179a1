"""What a run did and what it took, for `--summary FILE` and for whoever compares runs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher.atomic import write_whole
from runtime.request import SpeculationStats

PARTS = ("draft", "forward", "decide", "exchange", "coordinate")


class SummaryError(Exception):
    """The summary cannot be written."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One run. Tokens and seconds are this run's; `requests` counts the whole input, `failed` and `resumed` are in it.

    `seconds_by_part` has the keys of `PARTS`; `peak_memory_bytes` is by rank; `stats` are the job's speculation counts. Of a
    certified run these are of the 16-bit model's checks of the int4 model's tokens, and `inner` of the int4 model's own.
    """

    requests: int
    failed: int
    resumed: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    rounds: int
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    inner: SpeculationStats | None = None
    seconds_by_part: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    peak_memory_bytes: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if set(self.seconds_by_part) != set(PARTS):
            raise ValueError(f"seconds_by_part has {sorted(self.seconds_by_part)}, expected {sorted(PARTS)}")

    @property
    def tokens_per_second(self) -> float:
        """Output tokens a second of this run; 0 for a run that took no time."""
        return self.output_tokens / self.seconds if self.seconds > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """What the file holds."""
        own = {name: value for name, value in asdict(self).items() if name not in ("stats", "inner")}
        return {
            **own,
            "tokens_per_second": self.tokens_per_second,
            **speculation(self.stats),
            "certification": None if self.inner is None else certification(self.stats, self.inner),
            "peak_memory_bytes": {str(rank): size for rank, size in sorted(self.peak_memory_bytes.items())},
        }

    def write(self, path: str | Path) -> None:
        """Writes it as JSON, whole or not at all. Raises SummaryError."""
        try:
            write_whole(path, json.dumps(self.as_dict(), indent=2).encode() + b"\n")
        except OSError as error:
            raise SummaryError(f"cannot write the summary {path}: {error.strerror}") from error


def speculation(stats: SpeculationStats) -> dict[str, Any]:
    """How many drafts were checked, and stood."""
    return {
        "num_draft_tokens": stats.num_drafted,
        "num_accepted_draft_tokens": stats.num_accepted,
        "drafted_per_position": list(stats.drafted),
        "accepted_per_position": list(stats.accepted),
        "acceptance_histogram": list(stats.histogram),
        "mean_acceptance_length": stats.mean_acceptance_length,
        "draft_acceptance_rate": stats.draft_acceptance_rate,
    }


def certification(outer: SpeculationStats, inner: SpeculationStats) -> dict[str, Any]:
    """What became of the int4 model's tokens: per sequence and check of the 16-bit model."""
    return {
        "share_that_stood": outer.draft_acceptance_rate,
        "mean_window": outer.num_drafted / outer.steps if outer.steps else 0.0,
        "tokens_per_check": outer.mean_acceptance_length,
        "int4_speculation": speculation(inner),
    }
