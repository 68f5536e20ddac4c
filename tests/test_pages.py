"""The report's pages stand alone and can be read on a phone: looked at in headless Chromium, its network off."""

import base64
import json
import re
import shutil
import time

import nbformat
import pytest
from nbformat import v4

from helpers import claims, pages, render, report
from helpers.progress import Progress
from helpers.session import ROOT

STUDIES = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
RESULTS, FIGURES = ROOT / "data" / "results" / "smollm2", ROOT / "figures" / "smollm2"
DESK, PHONE = 1300, 420  # pixels
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
 --disable-component-update --disable-sync --disable-dev-shm-usage --host-resolver-rules=MAP_*_~NOTFOUND"""
ELSEWHERE = "![a picture](https://example.org/elsewhere.png)"


def stated(id, **more):
    """A claim as a results file has it."""
    claim = claims.Claim(id, f"a statement of {id}", "a rule", "a source", "nats", "behaviours", "random vectors")
    return claims.asdict(claim) | {"published": "-", "verdict": "not run", "reason": "no network", **more}


WORDS = r"""# 01 · A *study*

Next: [02](02_next.ipynb#claim-02.1)

## First

$a_1 < b$ and

$$\sum_i x_i^2$$

$x_$
"""


def put_out(**data):
    """A cell that shows data of some kinds."""
    named = {"markdown": "text/markdown", "png": "image/png", "text": "text/plain", "twin": render.TWIN}
    output = v4.new_output("display_data", {named[kind]: value for kind, value in data.items()})
    return v4.new_code_cell("1", outputs=[output])


def a_study():
    """A notebook with one of each thing that a page shows."""
    judged = stated("01.2", value=-0.5, low=-1.0, high=0.1, null_value=0.2, p=0.3, verdict="undecided", reason="")
    table, wide = claims.markdown([stated("01.1"), judged]), "|".join(["a_heading_that_does_not_break"] * 12)
    png = base64.b64encode((FIGURES / "07_matrix.png").read_bytes()).decode()
    points = {"type": "scatter", "mode": "markers", "x": [1, 2, 3], "y": [2, 1, 3]}
    said = v4.new_output("stream", text="word " * 100 + "<b>\n")
    failed = v4.new_output("error", ename="E", evalue="x", traceback=["\x1b[31mred\x1b[0m <b>"])
    return v4.new_notebook(
        cells=[
            v4.new_markdown_cell(WORDS),
            v4.new_code_cell("x = '" + "long " * 60 + "'\n" + "\n".join(f"y = {i}" for i in range(40))),
            v4.new_code_cell("1", outputs=[said, failed]),
            put_out(markdown=f"**Claim 01.1** (a source): *it*.  \n**Rule**: r.\n\n{table}"),
            put_out(markdown=f"{wide}\n{'|'.join(['---'] * 12)}\n{wide}"),
            put_out(png=png, text="figure x", twin={"data": [points], "layout": {"title": {"text": "</script>"}}}),
        ]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report of the committed notebooks and results, a made study, one that failed, and a page of latents."""
    out = tmp_path_factory.mktemp("report")
    shutil.copytree(RESULTS, out / "results")
    shutil.copytree(FIGURES, out / "figures")
    runs = {"99_failed": {"status": "failed", "seconds": 1.0, "error": "cell 1: a <b>"}}
    for path in STUDIES:
        notebook = nbformat.read(path, 4)
        (out / f"{path.stem}.html").write_text(render.render(notebook, path.stem), encoding="utf-8")
        runs[path.stem] = {"status": "ran", "seconds": 1.0, "error": "", "title": render.title(notebook, path.stem)}
    (out / "index.html").write_text(report.index(out, "p", runs, Progress([], {}, {}, lambda: None)), encoding="utf-8")
    (out / "made.html").write_text(render.render(a_study(), "01_made"), encoding="utf-8")
    latents = [[7, 0.01, [["before ", "word", " after" * 30, 3.0]], ["up"], ["down"]]]
    (out / "latents.html").write_text(pages.page("latents.html", title="Latents", data=latents), encoding="utf-8")
    near = {"joy": [1], "anger": []}
    points = [[0, 0, 1, 0.02, 3, [["a ", "word", " <b>"]], ["up"]], [5, 2, 2, 0.001, 8, [], ["down", "words"]]]
    made = pages.page(pages.MAP, title="Latents", data={"latents": points, "near": near})
    (out / pages.MAP).write_text(made, encoding="utf-8")
    return out


# --- what can be told without a browser --------------------------------------------------------------------------------


def test_formulas_are_mathml_and_what_is_none_stays_as_it_was_written():
    html = render.words("so $a_1 < b$.\n\n$$\\frac{1}{2}$$\n\n$x_$ and \\begin{matrix} a & b \\end{matrix}")
    assert html.count("<math") == 3 and '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block"' in html
    assert "<code>x_</code>" in html and "$" not in html


def test_links_lead_to_pages_claims_can_be_linked_to_and_verdicts_stand_out():
    html = render.words("[02](02_next.ipynb#x) **Claim 02.1** (here): **not run** **or** **holds**")
    assert 'href="02_next.html#x"' in html and '<strong id="claim-02.1">Claim 02.1</strong>' in html
    assert '<strong class="verdict not-run">not run</strong>' in html and "<strong>or</strong>" in html
    assert render.marked("<b>: fails; holds") == '&lt;b&gt;: <strong class="verdict fails">fails</strong>; holds'


def test_tables_scroll_inside_themselves_and_claims_know_their_columns():
    plain, judged = render.words("|a|b|\n|-|-|\n|1|2|"), render.words(claims.markdown([stated("01.1"), stated("01.2")]))
    assert '<div class="wide" tabindex="0"><table>' in plain and "data-label" not in plain
    assert '<table class="claims">' in judged and judged.count('<td data-label="verdict">') == 2


def test_a_page_has_its_first_heading_as_title_its_sections_as_contents_and_plotly_once_where_it_is_needed(folder):
    made, plain = (folder / "made.html").read_text(), (folder / "00_base.html").read_text()
    assert "<title>01 · A *study*</title>" in made and '<a href="#First">First</a>' in made
    assert made.count("plotly.js v") == 1 and "plotly.js v" not in plain
    assert len(plain) < 1.5e6 and render.title(v4.new_notebook(), "99_x") == "99_x"


def test_the_index_is_small_and_its_pictures_are(folder):
    page = (folder / "index.html").read_text()
    assert len(page.encode()) < 1e6 and page.count("<img") == len(STUDIES) + 1
    path = FIGURES / "07_matrix.png"
    assert base64.b64decode(pages.picture(path)) == path.read_bytes()
    assert len(pages.picture(path, 640)) < len(pages.picture(path)) / 3


def test_no_page_names_anything_to_fetch(folder):
    fetched = re.compile(r"""<(?:link|iframe|object|embed)\b|\bsrc=["']?(?!data:)[\w/]|@import|url\(["']?(?!data:|#)""")
    for path in folder.glob("*.html"):
        page = re.sub(r"<script>.*?</script>|<pre.*?</pre>", "", path.read_text(), flags=re.DOTALL)
        assert not fetched.search(page), path.name
        assert path.stem == "latents" or "default-src 'none'" in page


def test_a_map_of_thousands_of_latents_is_small_and_the_index_leads_to_one_that_is_there(folder, tmp_path):
    context = ["w" * 40, "token", "w" * 20]
    latents = [[1.25, -30.5, i, 0.0123, i, [context, context], ["likelier"] * 3] for i in range(4608)]
    assert len(pages.page(pages.MAP, title="t", data={"latents": latents, "near": {}})) < 2e6
    bare = report.index(tmp_path, "p", {}, Progress([], {}, {}, lambda: None))
    (tmp_path / pages.MAP).write_text("")
    assert pages.MAP not in bare
    assert f'href="{pages.MAP}"' in report.index(tmp_path, "p", {}, Progress([], {}, {}, lambda: None))


# --- what a browser shows ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium that resolves no name."""
    reason = "selenium is not installed: pip install -r requirements-test.txt"
    webdriver = pytest.importorskip("selenium.webdriver", reason=reason)
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no Chromium here; on Debian, apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag.replace("_", " ") if "MAP" in flag else flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield made
    made.quit()


def opened(browser, path, width):
    """Open a page at that width; what it asked of the network, and the errors it logged."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get("about:blank")
    logs(browser)
    browser.get(path.as_uri())
    return logs(browser)


def logs(browser):
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    return [url for url in urls if url.split(":")[0] not in ("file", "data", "blob", "about")], errors


def ask(browser, script):
    return browser.execute_script(f"return {script}")


def click(browser, selector):
    browser.find_element("css selector", selector).click()


def until(browser, script):
    for _ in range(100):
        if found := ask(browser, script):
            return found
        time.sleep(0.1)
    raise AssertionError(f"never: {script}")


# Whether everything that is seen ends within the page, but for what lies in a box that scrolls.
FITS = """[...document.querySelectorAll("img, table.claims td, pre, .wide, math, h1, h2, p, li")].every(
    seen => !seen.getClientRects().length || seen.getBoundingClientRect().right <= innerWidth)"""


@pytest.mark.parametrize("width", (DESK, PHONE))
@pytest.mark.parametrize("stem", ["index", "made", "latents", "features", *(path.stem for path in STUDIES)])
def test_a_page_asks_for_nothing_logs_no_error_and_fits_its_width(folder, browser, stem, width):
    asked, errors = opened(browser, folder / f"{stem}.html", width)
    assert not asked and not errors
    assert ask(browser, "document.documentElement.scrollWidth") <= width and ask(browser, FITS)
    assert ask(browser, "[...document.images].every(i => i.naturalWidth)")


def test_what_a_page_would_fetch_is_refused_by_the_page_itself_and_seen_here_if_it_is_not(folder, browser, tmp_path):
    page = render.render(v4.new_notebook(cells=[v4.new_markdown_cell(ELSEWHERE)]), "01_elsewhere")
    (tmp_path / "sealed.html").write_text(page)
    (tmp_path / "open.html").write_text(re.sub("<meta http-equiv=Content.*?>", "", page))
    url = ["https://example.org/elsewhere.png"]
    for name, why in (("sealed", "violates the following Content Security Policy"), ("open", "ERR_NAME_NOT_RESOLVED")):
        asked, errors = opened(browser, tmp_path / f"{name}.html", DESK)
        assert asked == url and why in errors[0], name


def test_formulas_are_drawn(folder, browser):
    opened(browser, folder / "made.html", PHONE)
    boxes = ask(browser, "[...document.querySelectorAll('math')].map(m => [m.clientWidth, m.clientHeight])")
    assert len(boxes) == 2 and all(wide > 20 and high > 10 for wide, high in boxes)
    assert ask(browser, "document.querySelector('math msub').getBoundingClientRect().height") > 5


@pytest.mark.parametrize("width", (DESK, PHONE))
def test_a_twin_is_drawn_at_once_at_a_desk_and_when_opened_on_a_phone(folder, browser, width):
    opened(browser, folder / "made.html", width)
    if width == PHONE:
        assert not ask(browser, "document.querySelector('details.twin').open")
        click(browser, "details.twin summary")
    assert until(browser, "document.querySelectorAll('.twin .main-svg .point').length") == 3
    assert ask(browser, "document.querySelector('.gtitle').textContent") == "</script>"
    assert not any(logs(browser)) and ask(browser, "document.documentElement.scrollWidth") <= width


def test_a_picture_fits_a_phone_and_grows_when_it_is_touched(folder, browser):
    opened(browser, folder / "index.html", PHONE)
    wide = "document.querySelector('.figure>img').clientWidth"
    assert ask(browser, wide) < PHONE
    click(browser, ".figure>img")
    assert ask(browser, wide) == ask(browser, "document.querySelector('.figure>img').naturalWidth") > PHONE
    assert ask(browser, "document.documentElement.scrollWidth") <= PHONE


def test_code_is_folded_opens_at_a_click_in_full_and_all_of_it_by_one_switch(folder, browser):
    opened(browser, folder / "made.html", DESK)
    is_open = "[...document.querySelectorAll('details.code')].map(d => d.open)"
    n = len(ask(browser, is_open))
    assert n > 3 and not any(ask(browser, is_open))
    assert ask(browser, "document.querySelector('details.code summary').textContent") == "41 lines of code"
    click(browser, "details.code summary")
    assert ask(browser, is_open) == [True] + [False] * (n - 1)
    high, whole = ask(browser, "(p => [p.clientHeight, p.scrollHeight])(document.querySelector('.code pre'))")
    assert high == whole > 600
    for expected, says in ((True, "Hide all code"), (False, "Show all code")):
        click(browser, "#all")
        assert ask(browser, is_open) == [expected] * n
        assert ask(browser, "document.getElementById('all').textContent") == says


def test_the_map_of_latents_is_searched_by_word_and_number_and_tells_what_is_pointed_at(folder, browser):
    opened(browser, folder / pages.MAP, DESK)
    count, told = (f"document.getElementById('{name}').textContent" for name in ("count", "told"))
    assert ask(browser, count) == "2 latents"
    field = browser.find_element("id", "word")
    for typed, found in (("WORD", "2 of 2"), ("words", "1 of 2"), ("nothing", "0 of 2"), ("#8", "1 of 2")):
        field.clear()
        field.send_keys(typed)
        assert ask(browser, count) == found
    assert "latent 8" in ask(browser, told) and "near the vector of joy" in ask(browser, told)
    field.clear()
    field.send_keys("up")
    point = "new PointerEvent('pointermove', {clientX: x, clientY: y})"
    at = "(c => [c.left + place(all[0])[0], c.top + place(all[0])[1]])(canvas.getBoundingClientRect())"
    browser.execute_script(f"const [x, y] = {at}; canvas.dispatchEvent({point})")
    assert (
        "latent 3" in ask(browser, told) and ask(browser, "document.querySelector('#told mark').textContent") == "word"
    )
    browser.find_element("css selector", "#behaviour option[value=joy]").click()
    assert ask(browser, "[...near]") == [1] and not any(logs(browser))


ROWS = "[...document.querySelectorAll('table.claims tbody tr')].filter(r => r.getClientRects().length)"


def test_the_table_of_claims_sorts_and_filters(folder, browser):
    kept = [c for path in RESULTS.glob("*.json") for c in json.loads(path.read_text())["claims"]]
    opened(browser, folder / "index.html", DESK)

    def column(n):
        return ask(browser, f"{ROWS}.map(r => r.cells[{n}].dataset.sort ?? r.cells[{n}].textContent)")

    def heading(n):
        click(browser, f"table.claims th:nth-child({n + 1}) button")

    assert len(column(0)) == len(kept)
    heading(0)
    assert column(0) == sorted(column(0)) and len(set(column(0))) > 1
    heading(1)
    ids = column(1)
    assert ids.index("01.2") < ids.index("01.10") and ids[0] < "01" < ids[-1]
    heading(1)
    assert column(1) == ids[::-1]
    for turn in (1, -1):  # numbers, those missing last either way
        heading(3)
        found = column(3)
        numbers = [float(x) for x in found if x]
        assert numbers == sorted(numbers)[::turn] and not any(found[len(numbers) :]) and found[-1] == ""

    select = browser.find_element("css selector", "#verdict option[value='not run']")
    select.click()
    assert len(column(0)) == sum(c["verdict"] == "not run" for c in kept)
    browser.find_element("css selector", "#verdict option[value='']").click()
    browser.find_element("css selector", "#kind option[value=main]").click()
    assert len(column(0)) == sum(c["main"] for c in kept)
    browser.find_element("id", "word").send_keys("HUNGARIAN" * 3)
    assert column(0) == [] and ask(browser, "document.getElementById('count').textContent").startswith("0 of ")


@pytest.mark.parametrize("stem", ("index", "made"))
def test_on_a_phone_a_claim_is_a_card_with_its_verdict_first(folder, browser, stem):
    opened(browser, folder / f"{stem}.html", PHONE)
    box = "(c, b = c.getBoundingClientRect()) => [c.dataset.label, b.top, b.left, b.right]"
    cards = ask(browser, f"{ROWS}.map(row => [...row.cells].map(cell => ({box})(cell)))")
    assert len(cards) >= 2
    for card in cards:
        first = min(card, key=lambda cell: cell[1])
        assert first[0] == "verdict" and all(0 <= left < right <= PHONE for _, _, left, right in card)
    if stem == "index":  # sorts there too
        click(browser, "table.claims th:nth-child(1) button")
        assert ask(browser, f"{ROWS}[0].dataset.verdict") == "holds"
