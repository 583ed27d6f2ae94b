"""Whatever a file holds, reading it ends in a result or in one of bitwright's own errors, soon and in little memory.

`make fuzz` runs a million inputs; what they find goes into corpus/, one file an input, and is replayed here for good.
"""

from __future__ import annotations

import hashlib
import os
import resource
import time
import traceback
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from readers import READERS

from bitwright.errors import BitwrightError

CORPUS = Path(__file__).parent / "corpus"
LONG = "BITWRIGHT_FUZZ_EXAMPLES" in os.environ
EXAMPLES = int(os.environ.get("BITWRIGHT_FUZZ_EXAMPLES", "150"))
SECONDS, MEGABYTES = 2.0, 200


def attempt(name: str, content: bytes, folder: Path) -> bool:
    """Read one file; whether it was taken. Untyped errors pass through; so do findings of time and memory.

    What takes too long is read once more: a busy machine is no finding.
    """
    try:
        return _attempt(name, content, folder)
    except TooSlow:
        return _attempt(name, content, folder)


class TooSlow(AssertionError):
    pass


def _attempt(name: str, content: bytes, folder: Path) -> bool:
    reader = READERS[name]
    path = folder / f"input{reader.suffix}"
    path.write_bytes(content)
    held, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            taken = reader.read(path) is not False
    except BitwrightError:
        taken = False
    spent = time.process_time() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 1024
    if spent >= SECONDS:
        raise TooSlow(f"{name}: {spent:.1f} s for {len(content)} bytes")
    assert grown < MEGABYTES, f"{name}: {grown:.0f} MB for {len(content)} bytes"
    return taken


def _kind(error: Exception) -> str:
    """A failure by what it is and where it came from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "bitwright" in f.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__} at {place}: {str(error)[:200]}"


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name, tmp_path_factory):
    for module in READERS[name].needs:
        pytest.importorskip(module)
    folder, examples = tmp_path_factory.mktemp("fuzz"), EXAMPLES // READERS[name].cost
    taken: dict[bool, int] = {True: 0, False: 0}
    found: dict[str, Path] = {}

    # Nothing is shrunk: an input is kept as it was, and one that takes long would be tried a hundred times.
    @settings(
        max_examples=examples, deadline=None, derandomize=not LONG, phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck), database=None,
    )  # fmt: skip
    @given(READERS[name].inputs())
    def damaged(content: bytes) -> None:
        try:
            taken[attempt(name, content, folder)] += 1
        except Exception as error:
            kept = (CORPUS if LONG else folder) / name / hashlib.sha256(content).hexdigest()[:16]
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(content)
            found.setdefault(_kind(error), kept)

    damaged()
    assert not found, "\n".join(f"{kind}: {path}" for kind, path in found.items())
    assert taken[False] > examples // 20, "the damage is too small to be noticed"


@pytest.mark.parametrize(
    "path", sorted(p for p in CORPUS.rglob("*") if p.is_file()), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_what_was_found_stays_mended(path, tmp_path):
    for module in READERS[path.parent.name].needs:
        pytest.importorskip(module)
    attempt(path.parent.name, path.read_bytes(), tmp_path)
