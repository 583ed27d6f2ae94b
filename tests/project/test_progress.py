"""Progress on a terminal, in a log, and not at all."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bitwright import progress
from bitwright.progress import Bars, Lines, Silent, progress_for, shows_progress


def work(shown) -> None:
    shown.start("Layers", 3)
    for name in ("conv1", "conv2", "conv3"):
        shown.start("Batches", None)
        shown.advance(5)
        shown.finish()
        shown.advance(1, name)
    shown.finish()


def test_silent(capsys):
    work(Silent())
    assert capsys.readouterr() == ("", "")


def test_lines_tell_each_stage(monkeypatch):
    stream = io.StringIO()
    work(Lines(stream))
    lines = stream.getvalue().splitlines()
    assert [line.split(" in ")[0] for line in lines] == ["  Batches: 5"] * 3 + ["Layers: 3/3"]
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    work(Lines(stream))
    assert "Layers: 2/3, about 0 s left conv2" in stream.getvalue()


def test_lines_tell_the_time_that_is_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    shown = Lines(stream)
    shown.start("Layers", 8)
    for now[0] in (20.0, 100.0):
        shown.advance()
    shown.start("Batches", None)
    now[0] = 200.0
    shown.advance(3)
    assert [line.strip() for line in stream.getvalue().splitlines()] == [
        "Layers: 1/8, about 2 min left",  # 20 s for one, 140 for seven
        "Layers: 2/8, about 5 min left",
        "Batches: 3",
    ]


def test_bars_draw_and_leave_the_terminal_clean():
    stream = io.StringIO()
    with Bars(Console(file=stream, force_terminal=True, width=100)) as shown:
        work(shown)
    text = stream.getvalue()
    assert "Layers" in text
    assert "3/3" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor is hidden once and comes back"


def test_bars_come_down_on_interrupt():
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Bars(Console(file=stream, force_terminal=True, width=100)) as shown:
        shown.start("Layers", 3)
        raise KeyboardInterrupt
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")


def test_unbalanced_calls_are_harmless():
    for shown in (Silent(), Lines(io.StringIO()), Bars(Console(file=io.StringIO()))):
        shown.advance()
        shown.finish()
        shown.close()


def test_choice_by_stream():
    assert isinstance(progress_for(io.StringIO()), Lines)
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    assert isinstance(progress_for(terminal), Bars)


@shows_progress
def tool(model, *, progress=None):
    work(progress or Silent())
    return progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Simulation:
    """What has a progress of its own."""

    def __init__(self, shown) -> None:
        self.progress = shown


def test_tools_draw_bars_at_a_terminal_only(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    used = tool(object())
    text = terminal.getvalue()
    assert "3/3" in text and text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    work(used)  # a simulation that a tool returns has the bars still
    assert terminal.getvalue() == text
    tool(Simulation(Silent()))
    assert terminal.getvalue() != text
    text = terminal.getvalue()
    tool(Simulation(used))  # with that simulation the next tool draws bars of its own
    assert terminal.getvalue() != text
    for stream in (io.StringIO(), None):
        monkeypatch.setattr("sys.stderr", stream)
        assert tool(object()) is None
        assert stream is None or stream.getvalue() == ""


def test_a_progress_that_is_given_is_used(monkeypatch):
    terminal, own = Terminal(), io.StringIO()
    monkeypatch.setattr("sys.stderr", terminal)
    tool(object(), progress=Lines(own))
    assert "Layers: 3/3" in own.getvalue()
    assert tool(object(), progress=Silent()) is not None
    assert tool(Simulation(Lines(own))) is None  # the simulation tells it itself
    assert terminal.getvalue() == ""


def test_long_tools_draw_bars():
    from bitwright.plugins import registry

    for name in ("quant_analyzer", "auto_quantize", "mixed_precision", "visualize", "measure_latency"):
        shown = registry.tool(name)
        assert shown.__wrapped__.__name__ == name and shown.__code__ is tool.__code__
