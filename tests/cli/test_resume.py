"""`kill -9` in the middle of AdaRound; the same command then redoes no finished layer and ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

FILES = ("net.onnx", "net.encodings", "net.qdq.onnx")


def layers(run):
    """Finished layers of the AdaRound step, file → time of writing."""
    try:
        events = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return {}
    names = [e["fingerprint"] for e in events if e["event"] == "step" and e["name"] == "adaround"]
    return {f: f.stat().st_mtime_ns for f in (run / "steps" / names[-1]).glob("*.npz")} if names else {}


def test_kill_and_go_on(net, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- bn_fold\n- adaround: {solver: gradient, iterations: 3000}\n")

    def start(out):
        words = ["quantize", net.model, "--data", net.npz, "--weights", "int4", "--recipe", recipe, "--out", out, "-q"]
        return subprocess.Popen([sys.executable, "-m", "bitwright", *map(str, words)])

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert start(straight).wait() == 0
    process = start(killed)
    try:
        while not layers(killed / ".run"):
            assert process.poll() is None, "it ended before it could be killed; give the recipe more iterations"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    finished = layers(killed / ".run")
    assert 0 < len(finished) < 3
    assert [f.name for f in killed.iterdir()] == [".run"]
    assert start(killed).wait() == 0
    now = layers(killed / ".run")
    assert len(now) == 3
    assert {f: now[f] for f in finished} == finished, "finished layers must not be redone"
    for name in FILES:
        assert (killed / name).read_bytes() == (straight / name).read_bytes(), name
