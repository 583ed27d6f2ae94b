"""How long a newcomer waits: each quickstart page's blocks in a process of their own, from the first import to the end.

    pip install "bitwright[torch,keras,tensorflow,report]" scikit-learn
    python benchmarks/first_result.py                      # a minute

Seconds of processor time of all threads, and so independent of what else the machine does; training of the page's
network included, installation not.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
MARKS = ("the network is trained", "first simulated accuracy", "exported, run on ONNX Runtime")
STATIONS = ("## Calibrate", "## Compare", "## End")


def main() -> None:
    """A line a framework."""
    print(f"| | lines of your own | {' | '.join(MARKS)} |\n|---|---|---|---|---|")
    before = 0.0
    for framework in ("pytorch", "keras", "tensorflow", "onnx"):
        page = (DOCS / f"quickstart-{framework}.md").read_text(encoding="utf-8") + "\n## End\n"
        _, _, rest = page.partition("## Calibrate")
        seconds = []
        for station in STATIONS:
            text = page[: page.index(station)]
            code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(used.ru_utime + used.ru_stime - before)
            before = used.ru_utime + used.ru_stime
        blocks = re.findall(r"```python\n(.*?)```", rest, re.S)
        lines = sum(bool(line.strip()) for block in blocks for line in block.splitlines())
        print(f"| {framework} | {lines} | {' | '.join(f'{s:.0f} s' for s in seconds)} |", flush=True)


if __name__ == "__main__":
    main()
