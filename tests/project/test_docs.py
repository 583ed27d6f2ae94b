"""What is there is documented, and what is documented is there."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import public_api
import pytest
import technique_pages

from bitwright import hookspecs
from bitwright.backend import Capability
from bitwright.plugins import Registry, registry

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {page.relative_to(DOCS).as_posix(): page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md")}
COMMANDS = PAGES["command-line.md"]


def commands():
    """Every command and group with its parameters, as `(words, parameter)`."""
    import typer

    from bitwright.cli.app import add_commands_of_tools, app

    add_commands_of_tools()

    def walk(command, words):
        yield words, command
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, [*words, name])

    return list(walk(typer.main.get_command(app), ["bitwright"]))


@pytest.mark.parametrize(
    ("words", "command"), commands(), ids=lambda value: "-".join(value) if isinstance(value, list) else ""
)
def test_every_command_and_option_is_documented(words, command):
    assert " ".join(words) in COMMANDS or words[-1] in COMMANDS
    for parameter in command.params:
        for option in parameter.opts:
            if option.startswith("-") and option not in ("--help", "-h"):
                assert re.search(rf"(?<![\w-]){option}(?![\w-])", COMMANDS), option


def test_no_documented_option_is_gone():
    known = {option for _, command in commands() for p in command.params for option in (*p.opts, *p.secondary_opts)}
    known |= {"--help", "--upgrade"}
    for page in ("command-line.md", "quickstart.md", "techniques.md", "concepts.md", "targets.md", "encodings.md"):
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGES[page])) - {"--quantization_overrides"}
        assert {option for option in used if "_" not in option} - {"--quantization"} <= known, page


def test_every_technique_has_a_page_with_all_that_one_says():
    for info in Registry(entry_points=False).techniques().values():
        page = PAGES[f"techniques/{info.name}.md"]
        assert re.findall(r"^\*\*(.*?)\.\*\*", page, re.M)[:5] == ["Formula", "Source", "Cost", "When", "When not"]
        for alias in info.aliases:
            assert f"`{alias}`" in page


def test_what_pages_of_techniques_have_from_the_code_is_of_today():
    for path, text in technique_pages.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python tests/project/technique_pages.py"


def test_every_public_module_and_tool_is_in_the_reference():
    """`make docs` writes their names, arguments and docstrings there."""
    text = "".join(PAGES[name] for name in PAGES if name.startswith("api/"))
    listed = re.findall(r"^::: (\S+)$", text, re.M)
    modules = set(public_api.facades()) - {"bitwright", "bitwright.cli"}
    tools = Registry(entry_points=False).tools()
    assert {name for name in listed if name.rpartition(".")[2] not in tools} == modules
    assert {name.rpartition(".")[2] for name in listed} >= set(tools)
    for name in listed:
        module, _, last = name.rpartition(".")
        thing = getattr(importlib.import_module(module), last) if last in tools else None
        assert thing is None or registry.tool(last) is thing, name


def test_recipe_example_is_valid(tmp_path):
    from bitwright.simulation import read_recipe

    (text,) = re.findall(r"```yaml\n(.*?)```", PAGES["techniques.md"], re.DOTALL)
    (tmp_path / "r.yaml").write_text(text)
    assert len(read_recipe(tmp_path / "r.yaml").steps) == 3


def test_every_hook_is_documented():
    hooks = [name for name in vars(hookspecs) if name.startswith("register_")]
    assert len(hooks) == 8
    text = "".join(PAGES[f"write-a-{page}.md"] for page in ("technique", "backend", "target", "runtime"))
    for hook in hooks:
        assert re.search(rf"def {hook}\(\)( -> .*)?:", text), hook
        assert getattr(hookspecs, hook).__doc__


def test_every_preset_scheme_and_environment_variable_is_documented():
    from bitwright.calibration._schemes import schemes
    from bitwright.formats import VERSIONS
    from bitwright.targets import target_names

    for name in target_names():
        family = name.partition("_v")[0]
        assert f"`{name}`" in PAGES["targets.md"] or f"`{family}_v" in PAGES["targets.md"], name
    for name in schemes():
        assert f"`{name}" in PAGES["concepts.md"]
    for version in VERSIONS:
        assert f"| {version}" in PAGES["encodings.md"]
    sources = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "core").rglob("*.py"))
    for variable in set(re.findall(r"BITWRIGHT_[A-Z_]+", sources)):
        assert variable in COMMANDS


def test_every_target_key_is_documented():
    from bitwright.targets import _schema as schema

    sections = [v for v in vars(schema).values() if isinstance(v, type) and issubclass(v, schema._Section)]
    keys = {key for section in sections for key in section.model_fields}
    assert {"extends", "strict_symmetric", "bitwidth", "op_list"} <= keys
    for key in keys - {"bitwright"}:
        assert f"`{key}`" in PAGES["targets.md"], key


def test_backend_page_names_the_whole_protocol():
    from bitwright.backend import Backend

    methods = [name for name in vars(Backend) if not name.startswith("_") and callable(getattr(Backend, name))]
    for name in methods:
        assert f"`{name}(" in PAGES["write-a-backend.md"], name
    for capability in Capability:
        assert f"`{capability.protocol.__name__}." in PAGES["write-a-backend.md"], capability
        assert f"`{capability}`" in PAGES["write-a-backend.md"], capability


def test_examples_in_the_technique_page_work():
    from bitwright.plugins import Registry
    from bitwright.testing import models
    from bitwright.testing.harness import run_technique
    from bitwright.testing.reference import ReferenceBackend

    (code,) = [block for block in blocks(PAGES["write-a-technique.md"]) if "class ClipWeights:" in block]
    scope: dict = {"__name__": "docs"}
    exec(code, scope)
    found = Registry((), entry_points=False)
    found.add(scope["ClipWeights"])
    technique = found.technique("clip_weights")
    model = models.mlp()
    applied = run_technique(technique, ReferenceBackend(), model, quantile=0.5)
    assert applied.outcome.report.rows


@pytest.mark.parametrize("page", sorted(PAGES))
def test_python_examples_compile(page):
    for block in blocks(PAGES[page]):
        compile(block, page, "exec")


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize(
    "page",
    [*(DOCS / name for name in sorted(PAGES)), ROOT / "README.md", ROOT / "CONTRIBUTING.md"],
    ids=lambda p: p.relative_to(ROOT).as_posix(),
)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_navigation_lists_every_page():
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(PAGES)


def test_decisions_have_one_form_and_fit_on_half_a_page():
    decisions = {name: text for name, text in PAGES.items() if name.startswith("decisions/")}
    index = decisions.pop("decisions/index.md")
    parts = ["Problem.", "Decision.", "Why.", "What it costs.", "When to revisit."]
    assert len(decisions) >= 10
    for name, text in decisions.items():
        assert re.findall(r"^\*\*(.*?)\*\*", text, re.M) == parts, name
        assert len(text.split()) <= 300, name
        assert f"]({name.removeprefix('decisions/')})" in index, name


TEXTS = {**PAGES, "README.md": (ROOT / "README.md").read_text(encoding="utf-8"),
         "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")}  # fmt: skip
FOLDERS = "core|backends|plugins|tests|docs|benchmarks|examples|changes"


@pytest.mark.parametrize("page", sorted(TEXTS))
def test_paths_and_names_of_the_code_are_there(page):
    code = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.M | re.S))
    for path in (re.match(rf"((?:{FOLDERS})/[\w./*-]*)(?:::\w+)?$", text) for text in code):
        assert path is None or list(ROOT.glob(path[1].rstrip("/"))), path[1]
    for name in (text for text in code if re.fullmatch(r"bitwright(\.\w+)+", text)):
        thing: object = __import__("bitwright")
        for part in name.split(".")[1:]:
            thing = getattr(thing, part, None) or importlib.import_module(f"{thing.__name__}.{part}")
        assert thing is not None, name


@pytest.mark.parametrize("page", sorted(TEXTS))
def test_examples_import_what_is_public(page):
    for block in blocks(TEXTS[page]):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom | ast.Import):
                assert not re.search(r"\bbitwright\S*\._", ast.unparse(node)), ast.unparse(node)


def test_no_page_sends_readers_to_private_modules():
    inside = {name for name in TEXTS if name.startswith("decisions/")} | {"architecture.md", "where-to-change.md"}
    for page in sorted(set(TEXTS) - inside):
        assert not re.findall(r"`bitwright(?:\.\w+)*\._\w+", TEXTS[page]), page


def test_configuration_example_loads(tmp_path):
    from bitwright.targets import load_target

    examples = re.findall(r"```json\n(.*?)```", PAGES["targets.md"], re.DOTALL)
    assert len(examples) == 2
    for index, text in enumerate(examples):
        file = tmp_path / f"example{index}.json"
        file.write_text(text)
        load_target(file)


def test_fragments_of_the_changelog_are_named_as_towncrier_reads_them():
    """Without "+" a name is an issue, and stands in the changelog as one."""
    written = {path.name for path in (ROOT / "changes").iterdir()} - {"README.md", "template.md.jinja"}
    kinds = "added|changed|deprecated|removed|fixed|security"
    assert not {name for name in written if not re.fullmatch(rf"(\d+|\+[a-z0-9-]+)\.({kinds})\.md", name)}
