"""`bitwright new` writes distributions that install, pass their own tests and work; and never a half of one."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from test_example_plugins import install, on_path

from bitwright.cli import main
from bitwright.cli.new import Kind, files_of, write_distribution
from bitwright.errors import InputError


@pytest.mark.parametrize(("kind", "name", "shown"), [("technique", "my-scales", "my_scales"),
                                                     ("target", "my_chip", "my-chip"),
                                                     ("backend", "my_net", "")])  # fmt: skip
def test_what_is_written_installs_passes_its_tests_and_works(kind, name, shown, tmp_path, monkeypatch, capsys):
    pytest.importorskip("hatchling")
    monkeypatch.chdir(tmp_path)
    assert main(["new", kind, name]) == 0
    folder = tmp_path / f"bitwright-{name.replace('_', '-')}"
    assert f"{folder.name} is written" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {folder.name}
    install(folder, tmp_path / "site")
    env = on_path(tmp_path / "site")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "--rootdir", str(folder),
         "--import-mode=importlib", str(folder / "tests")],
        check=False, capture_output=True, text=True, env=env, cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]
    listed = subprocess.run(
        [sys.executable, "-m", "bitwright", *([f"{kind}s", shown] if shown else ["plugins"])],
        check=True,
        capture_output=True,
        text=True,
        env=env,
    )
    assert (shown or f"backends: {name}") in listed.stdout and not listed.stderr


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("technique", "Adaround"), "can't be a name"),
        (("technique", "1st"), "can't be a name"),
        (("technique", "class"), "can't be a name"),
        (("technique", "../up"), "can't be a name"),
        (("technique", "a b"), "can't be a name"),
        (("technique", "x" * 60), "can't be a name"),
        (("technique", "cle"), "belongs to plugin 'bitwright_techniques.plugin'"),
        (("target", "htp-v73"), "belongs to plugin 'bitwright.targets.plugin'"),
        (("backend", "onnx"), "belongs to plugin 'bitwright_onnx.plugin'"),
        (("technique", "techniques"), "there is a package bitwright_techniques"),
        (("gizmo", "mine"), "gizmo"),
    ],
)
def test_bad_names_are_refused_and_nothing_is_written(words, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new", *words]) == 2
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.py").write_text("precious")
    assert main(["new", "technique", "my_scales", "--out", str(tmp_path / "mine")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["work.py"]


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    written = []
    write_text = Path.write_text

    def fails(self, *args, **options):
        written.append(self)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return write_text(self, *args, **options)

    monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(InputError, match="No space left"):
        write_distribution(tmp_path / "new", files_of(Kind.TECHNIQUE, "my_scales"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", list(Kind))
def test_every_placeholder_is_filled(kind):
    for path, text in files_of(kind, "my_scales").items():
        assert "@" not in path
        assert not [word for word in ("@NAME@", "@PUBLIC@", "@DASHED@", "@TITLE@", "@SUMMARY@") if word in text], path


@pytest.mark.parametrize("kind", list(Kind))
def test_all_that_is_imported_is_used_and_public(kind):
    for path, text in files_of(kind, "my_scales").items():
        if not path.endswith(".py"):
            continue
        tree = ast.parse(text)
        names: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module != "__future__":
                names |= {alias.asname or alias.name: str(node.module) for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.asname or alias.name.partition(".")[0]: alias.name for alias in node.names}
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not names.keys() - used, (path, names.keys() - used)
        private = {m for m in names.values() if m.startswith("bitwright.cli") or "._" in m}
        assert not private, (path, private)
