"""The pages in headless Chromium: offline, at desktop and phone width. Screenshots lie in pytest's folder."""

from __future__ import annotations

import numpy as np
import pytest
from analysis_models import conv_model
from browser import Page, chromium

import bitwright
from bitwright import QuantSim

pytest.importorskip("bokeh")

HOSTILE = '</script><img src=x onerror="document.title=1">'
PLOTS = "document.querySelectorAll('[data-root-id]').length"
READY = f"typeof Bokeh === 'object' && Bokeh.documents.length > 0 && Bokeh.documents[0].roots().length === {PLOTS}"
MODELS = "[...Bokeh.documents[0]._all_models.values()]"
IDLE = "Bokeh.documents.every((d) => d.is_idle)"


@pytest.fixture(scope="module", autouse=True)
def browser():
    chromium()


@pytest.fixture(scope="module")
def analysis(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("analysis")
    labels = np.arange(len(images)) % 5
    found = bitwright.quant_analyzer(
        conv_model(),
        images,
        labels=labels,
        out=out,
        target="htp_v66",
        weights="int4",
        name=f"net {HOSTILE}",
        batch_size=20,
    )
    return found, out / "analysis.html"


def opened(file, width, **options):
    page = Page(file, width, **options)
    page.wait(f"{READY} && {IDLE}")
    return page


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (1280, True)])
def test_the_analysis_opens_offline_and_fits(analysis, width, dark, tmp_path):
    found, file = analysis
    with opened(file, width, dark=dark) as page:
        assert page.errors == []
        outside = [url for url in page.requests if not url.startswith(("file:", "data:", "blob:"))]
        assert outside == [] and len([u for u in page.requests if u.startswith("file:")]) == 1
        assert page.value("document.documentElement.scrollWidth") <= width
        boxes = (
            "[...document.querySelectorAll('[data-root-id]')].map((e) => e.firstElementChild.getBoundingClientRect())"
        )
        sizes = page.value(f"{boxes}.map((r) => [r.width, r.height])")
        assert len(sizes) >= 5 and all(w > width / 2 - 40 and h > 150 for w, h in sizes)
        assert page.value("document.title") != "1", "names are text"
        assert HOSTILE in page.value("document.querySelector('h1').textContent")
        text = page.value("document.body.innerText")
        for a in found.advice:
            assert a.text.replace("`", "") in text
        assert page.value("document.querySelector('.verdict').textContent") == found.verdict
        text_and_ground = page.value(
            "(() => { const inputs = []; const walk = (n) => { if (n.shadowRoot) walk(n.shadowRoot);"
            " if (n.matches && n.matches('.bk-input')) inputs.push(n); [...n.children].forEach(walk); };"
            " walk(document.body); return inputs.map((e) => [getComputedStyle(e).color,"
            " getComputedStyle(e).backgroundColor]); })()"
        )
        assert len(text_and_ground) == 2 and all(ink != ground for ink, ground in text_and_ground)
        assert text_and_ground[0][1] == page.value("getComputedStyle(document.querySelector('figure')).backgroundColor")
        page.screenshot(tmp_path / f"analysis_{width}.png")


def test_a_table_sorts_and_a_site_is_chosen(analysis):
    found, file = analysis
    with opened(file, 1280) as page:
        head = "[...document.querySelectorAll('th')].find((h) => h.textContent === 'Alone')"
        page.value(f"{head}.querySelector('button').click()")
        column = page.value(
            f"(() => {{ const t = {head}.closest('table'); const i = {head}.cellIndex;"
            " return [...t.tBodies[0].rows].map((r) => Number(r.cells[i].dataset.v)); })()"
        )
        assert column == sorted(column) and len(column) == len(found.sensitivities)
        page.value(f"window.choosers = {MODELS}.filter((m) => m.type === 'Select'); 0")
        assert [d.site for d in found.parameters] in page.value("choosers.map((s) => s.options)")
        assert [d.site for d in found.activations] in page.value("choosers.map((s) => s.options)")
        notes = f"{MODELS}.filter((m) => m.type === 'Div').map((m) => m.text).join(' ')"
        assert "int4" in page.value(notes)
        page.value("choosers.forEach((s) => { s.value = s.options[2]; }); 0")
        page.wait(IDLE)
        third = found.activations[2]
        assert f"{third.low:.4g} to {third.high:.4g}" in page.value(notes)
        assert page.errors == []


def test_before_and_after(images, tmp_path):
    before = QuantSim(conv_model(spread=0.01), target="per_tensor").apply("fold_batch_norm")
    after = QuantSim(before.native, target="per_tensor", backend="onnx").apply("bias_correction", images)
    found = bitwright.visualize(before, after, images, out=tmp_path / "change.html")
    for width in (1280, 390):
        with opened(tmp_path / "change.html", width) as page:
            assert page.errors == [] and page.value("document.documentElement.scrollWidth") <= width
            assert page.value(PLOTS) == 3
            page.screenshot(tmp_path / f"change_{width}.png")
            assert "3 of 6 parameters changed, " in page.value("document.querySelector('.verdict').textContent")
    assert found.file == str(tmp_path / "change.html")
