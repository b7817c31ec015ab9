"""The page on a telephone and on a desk: nothing is cut off, and what is wider than the page scrolls and says so."""

from __future__ import annotations

import html
import json
import re

import pytest
from report_fakes import cells_of, grid_study, open_page, results_of

from syncbn.study.report.report import write_report

PHONE, DESK = 390, 1280
MEASURE = """
onload = () => {
  const found = {};
  for (const frame of document.querySelectorAll('iframe')) {
    const page = frame.contentDocument, style = frame.contentWindow.getComputedStyle;
    const boxes = [...page.querySelectorAll('.scroll')].filter(box => box.clientWidth);
    const cells = [...page.querySelectorAll('.stacked td')];
    const plots = [...page.querySelectorAll('.plot')].map(box => {
      const svg = box.querySelector('svg'), scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
      const sizes = [...svg.querySelectorAll('text')].map(text => parseFloat(style(text).fontSize) * scale);
      return {
        overflow: style(box).overflowX, shadows: style(box).backgroundImage.split('gradient(').length - 1,
        focus: box.tabIndex, wide: box.scrollWidth > box.clientWidth, text: Math.min(...sizes),
      };
    });
    found[frame.clientWidth] = {
      page: page.documentElement.scrollWidth,
      wide: boxes.filter(box => box.scrollWidth > box.clientWidth).map(box => ({
        overflow: style(box).overflowX, shadows: style(box).backgroundImage.split('gradient(').length - 1,
        focus: box.tabIndex, stacked: box.querySelector('.stacked') !== null,
      })),
      cells: cells.length, plots,
      right: Math.max(...cells.map(cell => cell.getBoundingClientRect().right)),
      heads: cells.map(cell => style(cell, '::before').content),
      table: style(page.querySelector('.stacked')).display,
    };
  }
  document.body.textContent = JSON.stringify(found);
};
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What a browser makes of a page of a large study, by the width of its window."""
    out = tmp_path_factory.mktemp("wide")
    study = grid_study(arms=8, values=8, seeds=6)
    cells = cells_of(study)
    text = write_report(study, cells, results_of(cells), out, command="syncbn study run").read_text()
    # A frame has the width that it is given; a browser's own window may have a least one.
    frames = [f'<iframe width="{size}" height="900" frameborder="0" srcdoc="{{}}"></iframe>' for size in (PHONE, DESK)]
    inner = html.escape(text, quote=True)
    body = "".join(frame.format(inner) for frame in frames)
    page = out / "frames.html"
    page.write_text(f'<!doctype html><meta charset="utf-8"><script>{MEASURE}</script><body>{body}</body>')
    dom = open_page(page, out)
    found = re.search(r"\{.*\}", re.sub(r"<script>.*?</script>", "", dom, flags=re.DOTALL))
    return {int(width): sizes for width, sizes in json.loads(html.unescape(found[0])).items()}


def test_the_page_is_never_wider_than_its_window(measured):
    assert measured.keys() == {PHONE, DESK}
    assert all(sizes["page"] <= width for width, sizes in measured.items())


def test_a_wide_table_scrolls_in_its_own_box_with_shadows_where_it_goes_on(measured):
    wide = measured[PHONE]["wide"]
    assert wide, "the means of eight sizes are wider than a telephone"
    assert all((box["overflow"], box["shadows"], box["focus"]) == ("auto", 4, 0) for box in wide)


def test_the_text_of_a_figure_can_be_read_on_a_telephone(measured):
    """It scrolls in its box where it would have to be smaller, and is whole on a desk."""
    phone, desk = measured[PHONE]["plots"], measured[DESK]["plots"]
    assert len(phone) == len(desk) == 4
    assert min(plot["text"] for plot in phone) >= 10, "pixels"
    for plot in phone:
        assert (plot["wide"], plot["overflow"], plot["shadows"], plot["focus"]) == (True, "auto", 4, 0)
    assert not any(plot["wide"] for plot in desk)


def test_tables_of_words_are_stacked_on_a_telephone(measured):
    phone, desk = measured[PHONE], measured[DESK]
    assert phone["cells"] == desk["cells"] == 7 * 7
    assert not any(box["stacked"] for box in phone["wide"])
    assert phone["right"] <= PHONE
    assert phone["table"] == "block"
    assert phone["heads"][:3] == ['"verdict"', '"difference"', '"95 % interval"'], "each number says what it is"
    assert (desk["table"], set(desk["heads"])) == ("table", {"none"})
