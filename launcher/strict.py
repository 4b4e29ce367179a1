"""What every checked part of a line has in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Given = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    """Frozen, with no unknown keys and no conversions; a field's description says what is expected of its value."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
