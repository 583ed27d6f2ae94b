"""One export on its way to a target's tool, and the lines that are typed for it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bitwright.errors import InputError
from bitwright.formats import EncodingsFile


@dataclass(frozen=True)
class Command:
    """One step.

    Attributes:
        purpose: what it does.
        line: what to type.
    """

    purpose: str
    line: str


@dataclass
class Job:
    """One bundle on its way to a tool.

    Attributes:
        directory, stem, model, encodings: the bundle's files.
        file: its encodings.
        shapes: of the model's inputs, for one sample; empty where the tool doesn't ask.
        outputs: names of the model's outputs.
        data: samples, as lines name them.
        soc: of Qualcomm's tools.
        schemas: of encodings files that the tools take, the preferred one first (`ToolchainInfo.schemas`).
        warnings: grows as lines are made.
    """

    directory: Path
    stem: str
    model: Path
    encodings: Path
    file: EncodingsFile
    shapes: Mapping[str, tuple[int, ...]]
    outputs: tuple[str, ...]
    data: str
    soc: str | None
    schemas: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)

    def beside(self, suffix: str) -> Path:
        """A file of the bundle, whether it is there or not."""
        return self.directory / f"{self.stem}{suffix}"

    def needed(self, suffix: str, how: str) -> Path:
        """A file of the bundle.

        Raises:
            InputError: it isn't there.
        """
        path = self.beside(suffix)
        if not path.exists():
            raise InputError(f"{self.directory} has no {path.name}: {how}")
        return path


def shell_line(*words: str | Path) -> str:
    """A line for a shell; words that begin with ``$`` are variables and stay as they are."""
    return " ".join(w if isinstance(w, str) and w.startswith("$") else shlex.quote(str(w)) for w in words)
