"""The backends of examples/plugins, as third parties ship them: installed by pip, then their own tests."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "plugins"


def installed(name, folder):
    """Where pip has put an example; what it needs is there already."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation",
               "--target", str(folder), str(EXAMPLES / name)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.skipif(find_spec("hatchling") is None, reason="building a distribution takes hatchling")
@pytest.mark.parametrize("name", ["bitwright_layers"])  # bitwright_jax has an environment of its own: `make jax`
def test_its_own_tests_pass_once_it_is_installed(name, tmp_path):
    found = installed(name, tmp_path / "site")
    paths = [str(found), *(str(ROOT / p) for p in ("core", "backends", "plugins"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLES / name / "tests")]
    done = subprocess.run(tests, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def lines(name, *files):
    return sum(len((EXAMPLES / name / name / file).read_text().splitlines()) for file in files)


def test_a_backend_on_the_dataflow_base_is_short():
    assert lines("bitwright_layers", "backend.py", "plugin.py") <= 150
    files = (path.name for path in (EXAMPLES / "bitwright_jax" / "bitwright_jax").glob("*.py"))
    assert lines("bitwright_jax", *files) <= 600


def test_the_guide_s_backend_is_the_one_that_is_tested():
    guide = (ROOT / "docs" / "write-a-backend.md").read_text(encoding="utf-8")
    source = (EXAMPLES / "bitwright_layers/bitwright_layers/backend.py").read_text(encoding="utf-8")
    assert f"```python\n{source}```" in guide
