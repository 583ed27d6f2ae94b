"""The searches' pages in headless Chromium: nothing missing, no error, nothing wider than the window."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from bitwright import auto_quantize, mixed_precision
from bitwright_search import auto_page, mixed_page
from bitwright_search.evaluation import ByMetric, Labelled
from bitwright_search.scores import metric_of

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
                 if (found := shutil.which(name))), None)  # fmt: skip

PROBE = """<script>
const told = {errors: []};
window.addEventListener("error", (e) => told.errors.push(String(e.message)));
const log = console.error; console.error = (...words) => { told.errors.push(words.join(" ")); log(...words); };
window.addEventListener("load", () => {
  const shown = (selector) => [...document.querySelectorAll(selector)].filter((e) => {
    const box = e.getBoundingClientRect(); return box.width > 0 && box.height > 0; }).length;
  told.dots = shown(".dots .dot"); told.rules = shown(".dots .rule");
  told.spots = document.querySelectorAll(".front .spot").length;
  told.plots = shown(".front svg"); told.bars = document.querySelectorAll("rect.first").length;
  told.tables = shown("table"); told.rows = shown("tbody tr");
  told.scroll = document.documentElement.scrollWidth; told.window = window.innerWidth;
  told.outside = [...document.querySelectorAll(".dots *, .front *, .tile, h1, h2, li")].filter((e) => {
    const box = e.getBoundingClientRect(); return box.right > window.innerWidth + 1 || box.left < -1; }).length;
  const button = document.querySelector("th button"); if (button) button.click();
  told.sorted = document.querySelectorAll("th[aria-sort]").length;
  const out = document.createElement("pre"); out.id = "told"; out.textContent = JSON.stringify(told);
  document.body.append(out);
});
</script>"""


@pytest.fixture(scope="module")
def results(net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    auto = auto_quantize(net.model, net.images, net.fidelity, allowed_drop=0.0, target="per_tensor", weights="int4",
                  schemes=["sqnr", "minmax"], techniques="bn_fold,cle,bias_correction",
                  wider=False, out=folder)  # fmt: skip
    mixed = mixed_precision(net.model, net.images, net.fidelity, candidates=[("int8", "uint8"), ("int4", "uint8")],
                    allowed_drop=0.2, solver="greedy", out=folder)  # fmt: skip
    return {"diagnosis": auto, "mixed_precision": mixed}


@pytest.fixture(scope="module")
def pages(results):
    return {name: result.files[f"{name.replace('_', ' ')} page"] for name, result in results.items()}


class Balance(HTMLParser):
    """Checks that tags close, and notes what is loaded from outside."""

    VOID = frozenset({"meta", "rect", "line", "path", "input", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.outside = [], []

    def handle_starttag(self, tag, attrs):
        self.outside += [v for k, v in attrs if k in ("src", "href") and v]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        pass


@pytest.mark.parametrize("name", ["diagnosis", "mixed_precision"])
def test_pages_are_whole_and_self_contained(pages, name):
    text = pages[name].read_text(encoding="utf-8")
    checker = Balance()
    checker.feed(text)
    assert checker.open == []
    assert checker.outside == []
    assert "http" not in re.sub(r"<title>.*?</title>", "", text)


@pytest.mark.parametrize(
    ("name", "accuracy", "verdict"),
    [("diagnosis", "a loss of 12.50 points, more than the 1.00 points allowed", auto_page.verdict),
     ("mixed_precision", "loses 12.50 points of float's top-1, 90.00%, 1.00 points allowed: the goal isn't met",
      mixed_page.verdict)],
)  # fmt: skip
def test_accuracies_are_in_percent_and_their_differences_in_points(results, name, accuracy, verdict):
    page = {"diagnosis": auto_page.render, "mixed_precision": mixed_page.render}[name]
    given = {"float_score": 0.9, "score": 0.775, "allowed_drop": 0.01, "met": False}
    as_accuracy = dataclasses.replace(results[name], metric="top-1", **given)
    assert accuracy in verdict(as_accuracy)
    text = page(as_accuracy, "t")
    assert "<strong>90.00%</strong>" in text and "<strong>77.50%</strong>" in text
    assert ">top-1, %<" in text and "0.775<" not in text
    as_score = dataclasses.replace(results[name], metric="score", **given)
    text = page(as_score, "t")
    assert "<strong>0.9</strong>" in text and ">score<" in text and "0.125" in verdict(as_score)


def test_what_is_measured_is_named(results):
    labelled, by_metric = Labelled(None, None), ByMetric(None, "agreement")
    assert [metric_of(e) for e in (labelled, by_metric, print, None)] == ["top-1", "agreement", "score", "score"]
    assert all(result.metric == "score" for result in results.values())
    assert "score" in str(results["diagnosis"].to_json())


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["diagnosis", "mixed_precision"])
def test_in_a_browser(pages, tmp_path, name, width):
    # A window of Chromium has a least width, so the page is looked at in a frame that is as narrow as a phone.
    page = tmp_path / "page.html"
    page.write_text(pages[name].read_text(encoding="utf-8").replace("</head>", f"{PROBE}</head>"), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id=f src="page.html" width="{width}" height="1600"></iframe><script>'
        'document.getElementById("f").onload = () => setTimeout(() => { const out = document.createElement("pre");'
        'out.id = "result"; out.textContent = document.getElementById("f").contentDocument.getElementById("told")'
        ".textContent; document.body.append(out); }, 50);</script>"
    )
    words = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
             f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--window-size=1400,1700",
             "--dump-dom", frame.as_uri()]  # fmt: skip
    ran = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="result">(.*?)</pre>', ran.stdout, re.DOTALL)
    assert found, ran.stderr[-500:]
    told = json.loads(found[1])
    assert told["errors"] == []
    assert told["window"] == width
    assert told["scroll"] <= width
    assert told["outside"] == 0
    assert told["tables"] >= 1
    assert told["rows"] >= 5
    assert told["sorted"] == 1
    if name == "diagnosis":
        assert told["dots"] == 7, "float, weights, activations, two schemes and two techniques"
        assert told["rules"] == 2 * told["dots"]
    else:
        assert told["plots"] == 2
        assert told["spots"] >= 6
        assert told["bars"] == 10
