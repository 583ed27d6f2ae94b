"""`kill -9` in the middle of AdaRound; the same command then redoes no finished layer and ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

FILES = ("net.onnx", "net.encodings", "net.qdq.onnx")


def layers(run):
    """Finished layers of the AdaRound step, file → time of writing."""
    try:
        events = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return {}
    names = [e["fingerprint"] for e in events if e["event"] == "step" and e["name"] == "adaround"]
    return {f: f.stat().st_mtime_ns for f in (run / "steps" / names[-1]).glob("*.npz")} if names else {}


def test_kill_and_go_on(net, tmp_path, run):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- bn_fold\n- adaround: {solver: gradient, iterations: 3000}\n")

    def words(out):
        return ["quantize", net.model, "--data", net.npz, "--weights", "int4", "--recipe", recipe, "--out", out, "-q"]

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert run(*words(straight)).status == 0
    process = subprocess.Popen([sys.executable, "-m", "bitwright", *map(str, words(killed))])
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
    assert run(*words(killed)).status == 0
    now = layers(killed / ".run")
    assert len(now) == 3
    assert {f: now[f] for f in finished} == finished, "finished layers must not be redone"
    for name in FILES:
        assert (killed / name).read_bytes() == (straight / name).read_bytes(), name


WATCHED = """
import os, runpy, signal, sys
def watched(real):
    def call(source, target, *a, **k):
        if EVENT in os.fspath(target):
            os.kill(os.getpid(), signal.NUMBER)
        return real(source, target, *a, **k)
    return call
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
os.replace, os.rename = watched(os.replace), watched(os.rename)
sys.argv[0] = "bitwright"
runpy.run_module("bitwright", run_name="__main__")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are another matter there")
@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_while_files_are_moved(net, tmp_path, run, number, status):
    script, out = tmp_path / "watched.py", tmp_path / "out"
    script.write_text(WATCHED.replace("EVENT", repr("net.qdq.onnx")).replace("NUMBER", number))
    words = list(map(str, ["quantize", net.model, "--data", net.npz, "--out", out, "-q"]))
    stopped = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)
    assert stopped.returncode == status, stopped.stderr
    assert stopped.stderr.count("\n") == 1 and "stopped" in stopped.stderr
    hidden = [p.name for p in out.rglob(".*") if p.name != ".run"] if out.exists() else []
    assert hidden == []
    assert run(*words).status == 0
    assert (out / "net.qdq.onnx").exists()


def test_names_that_are_no_file_names_or_look_like_patterns(net, tmp_path, run):
    def status(*words):
        ran = run(*words)
        assert "This is a bug" not in ran.err, ran.err
        return ran.status

    quantize = ("quantize", net.model, "--data", net.npz, "--out", tmp_path, "-q", "--name")
    assert status(*quantize, "..") == 2 and status(*quantize, "a/b") == 2
    assert list(tmp_path.iterdir()) == []
    assert status(*quantize, "[a]*") == 0
    assert status("verify", tmp_path, "--data", net.npz, "--name", "[a]*") == 0
    assert status("verify", tmp_path, "--data", net.npz, "--name", "a") == 2
    long = tmp_path / ("a" * 300)
    assert status("quantize", net.model, "--data", net.npz, "--out", long) == 2
    assert status("quantize", net.model, "--data", long, "--out", tmp_path) == 2
