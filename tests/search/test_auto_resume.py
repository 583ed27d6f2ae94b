"""`kill -9` at three random moments: the result is that of an undisturbed run, and what was finished isn't redone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx

SCRIPT = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
import numpy as np
import bitwright
from search_net import fidelity

folder, out = Path({folder!r}), Path(sys.argv[1])
images, exact = np.load(folder / "images.npy"), np.load(folder / "exact.npy")
log = (out.parent / f"{{out.name}}.log").open("a")

def evaluate(model):
    score = fidelity(model, images, exact)
    # Scores say which network it was: the log shows what was evaluated, and how often.
    print(json.dumps([sys.argv[2], score]), file=log, flush=True)
    time.sleep(0.05)
    return score

r = bitwright.auto_quantize(folder / "net.onnx", images, evaluate, allowed_drop=0.0, target="per_tensor",
                            weights="int4", out=out)
print(json.dumps([[t.name, t.status, t.score, list(t.steps)] for t in r.trials]))
"""


def finished(out: Path) -> dict[str, str]:
    """Fingerprint → name of the stages that are stored."""
    try:
        lines = (out / ".run/journal.jsonl").read_text().splitlines()
    except OSError:
        return {}
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return {e["fingerprint"]: e["name"] for e in events if e["event"] == "stage"}


def weights(path: Path) -> dict[str, bytes]:
    """A model's constants; their order in the file isn't part of the result."""
    return {t.name: onnx.numpy_helper.to_array(t).tobytes() for t in onnx.load(path).graph.initializer}


def evaluations(out: Path, session: str) -> int:
    log = out.parent / f"{out.name}.log"
    if not log.exists():
        return 0
    return sum(json.loads(line)[0] == session for line in log.read_text().splitlines())


def test_three_kills(net, tmp_path):
    script = tmp_path / "search.py"
    script.write_text(SCRIPT.format(here=str(Path(__file__).parent), folder=str(net.folder)))

    def start(out: Path, session: str) -> subprocess.Popen[str]:
        words = [sys.executable, str(script), str(out), session]
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    process = start(straight, "straight")
    expected, _ = process.communicate()
    assert process.returncode == 0
    total = len(finished(straight))

    rng = random.Random(7)
    stops = sorted(rng.sample(range(2, total - 2), 3))
    stored: dict[str, int] = {}
    for session, stop in enumerate(stops):
        process = start(killed, str(session))
        try:
            while len(finished(killed)) < stop:
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.15))
            os.kill(process.pid, signal.SIGKILL)
        finally:
            process.kill()
            process.communicate()
        now = finished(killed)
        assert len(now) < total
        assert not list(killed.glob("net.*")), "nothing is exported before the search has ended"
        for fingerprint in now:
            for record in (killed / ".run/steps" / fingerprint).glob("*.npz"):
                stored[str(record)] = record.stat().st_mtime_ns
    before = sum(name == "auto: evaluate" for name in finished(killed).values())
    process = start(killed, "last")
    output, _ = process.communicate()
    assert process.returncode == 0
    assert json.loads(output) == json.loads(expected)
    assert weights(killed / "net.onnx") == weights(straight / "net.onnx")
    assert (killed / "net.encodings").read_bytes() == (straight / "net.encodings").read_bytes()
    assert weights(killed / "net.qdq.onnx") == weights(straight / "net.qdq.onnx")
    kept = {r: m for r, m in stored.items() if Path(r).exists()}
    assert kept
    assert {r: Path(r).stat().st_mtime_ns for r in kept} == kept, "finished stages must not be run again"
    # Each stage was stored once, over all processes.
    names = [e for e in map(json.loads, (killed / ".run/journal.jsonl").read_text().splitlines())
             if e["event"] == "stage"]  # fmt: skip
    assert len(names) == len({e["fingerprint"] for e in names})
    # A kill may fall between a stage's record and its line in the journal: then the line is missing, not the stage.
    assert total - len(stops) <= len(names) <= total
    unlogged = evaluations(straight, "straight") - before - evaluations(killed, "last")
    assert 0 <= unlogged <= total - len(names)
