"""`plan report` in a real headless Chromium: it renders, says nothing in the console, and works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import MISSING, Browser, browser
from made_plans import made_plan
from made_sweeps import made_sweep

from paraplan.page import plan_page
from paraplan.page_sweep import sweep_page

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"not checked in a browser: {', '.join(MISSING)} not installed"
)


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(plan_page(made_plan(pipeline=4, virtual_stages=1)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "sweep.html"
    file.write_text(sweep_page(made_sweep()), encoding="utf-8")
    return file


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("which", ["report", "sweep"])
def test_renders(
    window: Browser,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    which: str,
    width: int,
    dark: bool,
) -> None:
    window.emulate(width=width, dark=dark)
    window.open(request.getfixturevalue(which))
    assert window.messages() == []
    assert window.run("return document.documentElement.scrollWidth") <= width
    background = window.run("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
    sizes = window.run(
        "return [...document.querySelectorAll('section, figure svg, #timeline svg, table')]"
        ".map((e) => [e.getBoundingClientRect().width, e.getBoundingClientRect().height])"
    )
    assert len(sizes) > 10
    assert all(w > 20 and h > 20 for w, h in sizes)
    shot = tmp_path / "page.png"
    window.screenshot(shot)
    assert shot.stat().st_size > 20_000


def test_text_has_contrast(window: Browser, report: Path) -> None:
    """WCAG AA, 4.5 : 1, of text on the page and of numbers on the devices' colours."""
    script = """
        const light = (c) => { const p = c.match(/\\d+/g).slice(0, 3).map((v) => {
            const x = v / 255; return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4; });
            return 0.2126 * p[0] + 0.7152 * p[1] + 0.0722 * p[2]; };
        const ratio = (a, b) => { const [x, y] = [light(a), light(b)];
            return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05); };
        const paper = getComputedStyle(document.body).backgroundColor;
        const found = [...document.querySelectorAll('p, td, dt, figcaption, nav a, caption')]
            .map((e) => ratio(getComputedStyle(e).color, paper));
        const device = document.querySelector('.device');
        for (let i = 0; i < 8; i++) {
            device.setAttribute('class', 'device m' + i);
            found.push(ratio(getComputedStyle(device.querySelector('text')).fill,
                             getComputedStyle(device.querySelector('rect')).fill));
        }
        return found;"""
    for dark in (False, True):
        window.emulate(width=1200, dark=dark)
        window.open(report)
        assert min(window.run(script)) >= 4.5


def column(window: Browser, table: str, number: int) -> list[str]:
    cells: list[str] = window.run(
        "return [...document.querySelector(arguments[0]).tBodies[0].rows]"
        ".filter((row) => !row.hidden).map((row) => row.cells[arguments[1]].textContent)",
        table,
        number,
    )
    return cells


def test_tables_sort_from_the_keyboard(window: Browser, report: Path) -> None:
    window.emulate(width=1200)
    window.open(report)
    window.run("document.querySelectorAll('#stages .sort')[0].focus()")
    assert column(window, "#stages table", 0) == ["0", "1", "2", "3"]
    window.press("Enter", "Enter")
    assert column(window, "#stages table", 0) == ["3", "2", "1", "0"]
    sorts = window.run("return [...document.querySelectorAll('#stages th')].map((h) => h.ariaSort)")
    assert sorts[0] == "descending" and set(sorts[1:]) == {None}
    window.press("Tab", *["Tab"] * 4, "Enter")  # the sixth head: forward
    forward = [float(value) for value in column(window, "#stages table", 5)]
    assert forward == sorted(forward)


def test_devices_are_chosen_with_arrow_keys(window: Browser, report: Path) -> None:
    window.emulate(width=1200)
    window.open(report)
    says = "return document.getElementById('mesh-says').textContent"
    window.run("document.querySelector('.device').focus()")
    assert "Device 0," in window.run(says)
    window.press("Right", "Right")
    assert "Device 2," in window.run(says) and "pipeline rank 2" in window.run(says)
    tab_stops = "return document.querySelectorAll('.device[tabindex=\"0\"]').length"
    assert window.run(tab_stops) == 1, "one stop for Tab, arrows inside"


def test_the_timeline_zooms(window: Browser, report: Path) -> None:
    window.emulate(width=1200)
    window.open(report)
    view = "return document.querySelector('#timeline svg').getAttribute('viewBox').split(' ')"
    whole = window.run(view)
    window.run("document.getElementById('timeline').focus()")
    window.press("+", "+")
    assert float(window.run(view)[2]) == float(whole[2]) / 4
    window.press("End")
    left, _, width, _ = map(float, window.run(view))
    assert left + width == float(whole[2])
    window.run("document.querySelector('[data-zoom=whole]').click()")
    assert window.run(view) == whole


def test_the_theme_can_be_chosen(window: Browser, report: Path) -> None:
    window.emulate(width=1200, dark=False)
    window.open(report)
    paper = "return getComputedStyle(document.body).backgroundColor"
    seen = [window.run(paper)]
    for _ in range(3):
        window.run("document.getElementById('theme').click()")
        seen.append(window.run(paper))
    light, dark = "rgb(255, 255, 255)", "rgb(13, 17, 23)"
    assert seen == [light, light, dark, light]


def test_print_leaves_controls_out(window: Browser, report: Path) -> None:
    window.emulate(width=800, media="print")
    window.open(report)
    shown = "return getComputedStyle(document.querySelector(arguments[0])).display"
    assert window.run(shown, "nav") == "none"
    assert window.run(shown, ".copy") == "none"
    assert window.run(shown, "#stages table") == "table"
    assert window.messages() == []


def test_points_filter_and_sort(window: Browser, sweep: Path) -> None:
    window.emulate(width=1200)
    window.open(sweep)
    window.run("document.querySelector('#points input').focus()")
    window.press(*"h200 infe")
    assert column(window, "#points table", 1) == []
    window.press(*["\ue003"] * 5)  # backspace
    assert column(window, "#points table", 1) == ["8", "16", "32", "64"]
    said = window.run("return document.querySelector('#points output').textContent")
    assert said == "4 of 12 rows"
    window.run("document.querySelectorAll('#points .sort')[1].focus()")
    window.press("Enter", "Enter")
    assert column(window, "#points table", 1) == ["64", "32", "16", "8"]


def test_unknown_figures_sort_last(window: Browser, sweep: Path) -> None:
    window.emulate(width=1200)
    window.open(sweep)
    heads = window.run(
        "return [...document.querySelectorAll('#points .sort')].map((b) => b.textContent)"
    )
    at = heads.index("days")
    for _ in range(2):
        window.run("document.querySelectorAll('#points .sort')[arguments[0]].click()", at)
        days = column(window, "#points table", at)
        assert days[-1] == "-" and "-" not in days[:-1]


def test_points_of_charts_lead_to_their_rows(window: Browser, sweep: Path) -> None:
    window.emulate(width=1200)
    window.open(sweep)
    window.run("document.querySelector('#front .point.best[data-row=p8]').focus()")
    window.press("Enter")
    assert window.run("return document.querySelector('tr.chosen').id") == "p8"
    window.run(
        "document.querySelector('#front .point[data-row=p0]')"
        ".dispatchEvent(new MouseEvent('click'))"
    )
    assert window.run("return [...document.querySelectorAll('tr.chosen')].map((r) => r.id)") == [
        "p0"
    ]
    assert window.messages() == []
