"""The distributions in examples/plugins, installed by pip as users do, pass their own tests; guides quote them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "plugins"
DOCS = ROOT / "docs"
MINE = ("bitwright_acme_npu", "bitwright_hqq")
GUIDES = {
    "write-a-technique.md": "bitwright_hqq",
    "write-a-target.md": "bitwright_acme_npu",
    "write-a-runtime.md": "bitwright_acme_npu",
}


def install(source: Path, site: Path) -> None:
    """A distribution, built and installed into a folder; nothing is fetched."""
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--disable-pip-version-check", "--target", str(site), str(source)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip


def on_path(*folders: Path) -> dict[str, str]:
    """The environment of a process that sees these folders first, then what this one sees."""
    path = os.pathsep.join([*map(str, folders), *(p for p in sys.path if p)])
    return {**os.environ, "PYTHONPATH": path, "BITWRIGHT_PLUGINS": ""}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """From the name of an example to the folder that it is installed in."""
    pytest.importorskip("hatchling")
    pytest.importorskip("onnxruntime")
    made = {}

    def site(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            install(EXAMPLES / name, made[name])
        return made[name]

    return site


@pytest.mark.parametrize("name", MINE)
def test_an_example_passes_its_tests_from_an_install(name, site, tmp_path):
    assert list(site(name).glob(f"{name}-*.dist-info/entry_points.txt"))
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "--rootdir", str(tmp_path),
         "--import-mode=importlib", str(EXAMPLES / name / "tests")],
        check=False, capture_output=True, text=True, env=on_path(site(name)), cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]


def test_the_command_line_verifies_on_the_examples_runtime(site, tmp_path):
    """From the model to the row of `bitwright verify`, with both distributions installed."""
    import numpy as np

    env = on_path(*map(site, MINE))
    file = EXAMPLES / "bitwright_acme_npu" / "tests" / "test_acme_npu.py"
    script = f"import runpy; found = runpy.run_path({str(file)!r}); found['onnx'].save(found['network'](), 'm.onnx')"
    subprocess.run([sys.executable, "-c", script], check=True, env=env, cwd=tmp_path, capture_output=True)
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).normal(size=(16, 3, 12, 12)).astype(np.float32))

    def bitwright(*words: str) -> str:
        ran = subprocess.run([sys.executable, "-m", "bitwright", *words], check=False, env=env, cwd=tmp_path,
                             capture_output=True, text=True)  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    bitwright("quantize", "m.onnx", "--data", "d.npz", "--target", "acme-npu", "--recipe", "hqq", "--out", "o", "-q")
    assert (tmp_path / "o" / "m.acme.npz").exists()
    for words in ((), ("--runtime", "acme-npu")):
        shown = bitwright("verify", "o", "--data", "d.npz", "-q", *words)
        assert re.search(r"^integer \(acme-npu\) +\d", shown, re.M)
        assert "rounds halves away from zero" in shown
    assert "integer (onnxruntime)" in bitwright("verify", "o", "--data", "d.npz", "-q", "--runtime", "onnxruntime")
    assert re.search(r"^acme-npu +int8 +uint8 +Acme NPU", bitwright("targets"), re.M)
    assert re.search(r"^hqq +half_quadratic +Choose weight scales", bitwright("techniques"), re.M)
    listed = bitwright("plugins")
    assert re.search(r"^acme_npu +bitwright-acme-npu 1\.0\.0 +ok +targets: acme-npu; runtimes: acme-npu", listed, re.M)


@pytest.mark.parametrize(("page", "example"), GUIDES.items())
def test_a_guides_code_is_that_of_the_example(page, example):
    """Every block that begins with a file's name is a part of that file, whole lines in their order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    quoted = re.findall(r"```(?:python|toml|json)\n(?:# |// )(\S+/\S+|pyproject\.toml)[^\n]*\n(.*?)```", text, re.S)
    assert quoted, "the guide quotes nothing"
    for file, block in quoted:
        source = (EXAMPLES / example / file).read_text(encoding="utf-8")
        rest = source
        for part in re.split(r"^[ ]*…\n", block, flags=re.M):
            wanted = part.strip("\n")
            if wanted not in rest:  # a method, which the page shows by itself
                wanted = textwrap.indent(wanted, "    ")
            assert wanted in rest, f"{page} quotes what {file} doesn't say:\n{wanted}"
            rest = rest[rest.index(wanted) + len(wanted) :]
