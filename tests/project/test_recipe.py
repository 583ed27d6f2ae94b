"""Recipes: every way to write one, and errors that name the step and the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import Field

from bitwright.errors import InputError, PluginError
from bitwright.hookspecs import TechniqueInfo
from bitwright.plugins import Registry
from bitwright.simulation import read_recipe
from bitwright.simulation._recipe import check_settings
from bitwright.technique import Outcome, Recipe, Settings, Step


class RoundSettings(Settings):
    iterations: int = Field(1000, ge=1)
    beta: tuple[float, float] = (20.0, 2.0)


class Round:
    """Rounds."""

    name: ClassVar[str] = "round"
    Settings: ClassVar[type[Settings]] = RoundSettings
    requires: ClassVar[frozenset[Any]] = frozenset()

    def statistics(self, graph, plan, settings):
        return ()

    def apply(self, ctx):
        return Outcome()


@pytest.fixture
def registry():
    found = Registry((), entry_points=False)
    found.add(TechniqueInfo("round", "Rounds.", factory=Round, aliases=("r",)))
    found.add(TechniqueInfo("fold", "Folds.", factory=Round, settings=Settings))
    return found


WANTED = Recipe((Step("fold"), Step("round", {"iterations": 5})))
CONTENT = ["fold", {"r": {"iterations": 5}}]


def test_every_form_gives_the_same_recipe(tmp_path, registry):
    import yaml

    (tmp_path / "r.json").write_text(json.dumps(CONTENT))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(CONTENT))
    (tmp_path / "r.yml").write_text(yaml.safe_dump({"steps": CONTENT}))
    for source in (CONTENT, WANTED, tmp_path / "r.json", str(tmp_path / "r.yaml"), tmp_path / "r.yml"):
        assert read_recipe(source, registry) == WANTED
    assert read_recipe(" fold , r", registry) == Recipe((Step("fold"), Step("round")))
    assert read_recipe([{"round": None}], registry) == Recipe((Step("round"),))
    assert read_recipe(None, registry) == Recipe(())


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("fold,,round", InputError, "empty step"),
        ("", InputError, "empty step"),
        ("fold,ruond", PluginError, r"recipe, step 2: there is no technique 'ruond' \(did you mean 'round'"),
        ([], InputError, "no step"),
        ({"fold": {}, "round": {}}, InputError, "list of steps, not a mapping with 2 keys"),
        ([{"fold": {}, "round": {}}], InputError, "step 1: write a name"),
        ([3], InputError, "step 1: write a name, or one name with its settings, not 3"),
        ([{"round": 5}], InputError, "the settings of 'round' must be a mapping, not 5"),
        (
            [{"round": {"iteration": 5}}],
            InputError,
            "step 1: round: there is no setting 'iteration'; there are: iterations, beta",
        ),
        (
            ["fold", {"r": {"iterations": 0}}],
            InputError,
            "step 2: round: iterations: input should be greater than or equal to 1, got 0",
        ),
        ([{"round": {"beta": [1, "x"]}}], InputError, r"round: beta\.1: input should be a valid number.* got 'x'"),
        ([{"fold": {"x": 1}}], InputError, "there are: none"),
    ],
)
def test_errors_name_step_and_field(registry, source, error, message):
    with pytest.raises(error, match=message):
        read_recipe(source, registry)


LEVELS = ",".join(f"&{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]" for i in range(9))
BILLIONS = f"- [&a [{','.join('x' * 10)}],{LEVELS}]"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.json", "[", "isn't JSON"),
        ("r.yaml", "a: [", "isn't YAML"),
        ("r.yaml", "", "not nothing"),
        ("r.yaml", "!!python/object:os.x {}", "isn't YAML"),
        ("r.yaml", "- &a [" + "x," * 99 + "&b [*a, *a], *b]", "at most 10,000"),
        ("r.yaml", BILLIONS, "at most 10,000"),
        ("r.yaml", f"- {'x' * 10_000}: {{}}", r"^.{0,400}$"),
        ("r.json", "[" * 100_000, "isn't JSON"),
    ],
)
def test_bad_files(tmp_path: Path, registry, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_recipe(tmp_path / name, registry)


def test_unreadable_files(tmp_path, registry):
    with pytest.raises(InputError, match="No such file"):
        read_recipe(tmp_path / "absent.yaml", registry)
    (tmp_path / "latin.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="can't read"):
        read_recipe(tmp_path / "latin.yaml", registry)


def test_check_settings_gives_the_model(registry):
    assert check_settings("r", {"iterations": 3}, registry) == RoundSettings(iterations=3)
