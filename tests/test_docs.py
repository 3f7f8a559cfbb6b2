"""The docs site builds without a warning, and a browser finds every page whole: console, links, anchors, formulas, figures.

$TRANSFORMER2_SITE names a finished build to look at instead of building one. $TRANSFORMER2_REQUIRE_BROWSER=1 makes a missing Chromium a failure.
"""
import functools, http.server, json, os, re, shutil, subprocess, sys, threading, time, urllib.request
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import numpy as np
import pytest
from live import picture, turned
from reader import RE_BADGE, RE_CALLOUT, callout, directives, link_names, markdown, read, rooms, start, tutorials
from readme import readme

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--window-size=1400,2000"]


# --- what the reader makes of a notebook

def test_the_reader_knows_nbdevs_directives():
    assert directives("#| export\nimport torch") == {"export": ""} and directives("x = 1  #| hide") == {}
    assert directives("#| echo: false\n#| fig-cap: a, b\nx") == {"echo": "false", "fig-cap": "a, b"}
    room = rooms()[0]
    cells = ["#| default_exp a", "#| hide\n%pip install x", "#| hide\nsecret = 1", "#| export\nimport re, os", "#| gpu\nassert 1", "#| echo: false\nprint()"]
    nb = dict(cells=[dict(cell_type="code", source=s, outputs=[]) for s in cells])
    shown = read(json.dumps(nb), room.doc).cells
    assert [c.source for c in shown] == ["secret = 1", "import re, os", "assert 1", "print()"]
    assert [c.metadata.tags for c in shown] == [["hide-input"], ["exported", "hide-input"], ["gpu"], ["remove-input"]]
    assert shown[0].metadata.mystnb["code_prompt_show"] == "Set-up"


def test_callouts_the_papers_voice_and_links():
    turn = lambda s: RE_CALLOUT.sub(callout, s)
    assert turn("::: {.callout-note}\ntext\n:::") == ":::{note}\ntext\n:::"
    assert turn('::: {.callout-tip title="A b"}\ntext\n:::') == ":::{admonition} A b\n:class: tip\n\ntext\n:::"
    assert turn("::: {.callout-note}\n## Departure\n\ntext\n:::").startswith(":::{admonition} Departure\n:class: note\n")
    room = rooms()[0]
    assert markdown("> *The paper says* (section 3): x", room, {}).startswith("{.paper-says}\n> ")
    assert markdown("see [there](77_nowhere.ipynb#x) and [here](00_svd.ipynb)", room, {}) == "see there and [here](00_svd.ipynb)"
    assert link_names("`decompose()` and\n```\n`decompose()`\n```", room, {}) == "[`decompose()`](#api-svd-decompose) and\n```\n`decompose()`\n```"


def test_only_names_that_are_meant_become_links():
    room, known = rooms()[0], {"svd.decompose": "a", "rollout.generate": "b", "TwoPass": "c", "linear_names": "d"}
    for text in ("`svd.decompose`", "`transformer2_nbdev.svd.decompose`", "`decompose()`", "`TwoPass`", "`linear_names`", "`rollout.generate()`"):
        assert link_names(text, room, known).startswith("[`"), text
    for text in ("`decompose`", "`generate`", "`model.generate`", "`model.generate()`", "`generate()`", "`dense`", "[`TwoPass`](x)"):
        assert link_names(text, room, known) == text, text


def test_the_readme_follows_the_front_door():
    text, images = readme()
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text, "run python docs/readme.py"
    assert images and all((ROOT / n).read_bytes() == b for n, b in images.items())
    for target in re.findall(r"\]\((?!http)([^)#]+)", text): assert (ROOT / target).exists(), target


def test_a_notebook_carries_its_own_button():
    for r in [start(), *rooms(), *tutorials()]:
        prose = "\n".join("".join(c["source"]) for c in json.loads(r.path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")
        assert [m[1] for m in RE_BADGE.finditer(prose)] == [r.colab], r.path.name


def test_rooms_keep_to_their_size():
    for r in rooms():
        assert r.path.stat().st_size < 250_000, f"{r.path.name} has {r.path.stat().st_size} bytes"
        for c in json.loads(r.path.read_text(encoding="utf-8"))["cells"]:
            for o in c.get("outputs", []):
                assert o["output_type"] != "error", f"{r.path.name} shows an error"
                assert len("".join(o.get("data", {}).get("image/png", ""))) * 3 // 4 < 50_000, f"{r.path.name} has a figure above 50 kB"


def test_every_room_ends_alike():
    "What to remember, exercises with folded answers, and a link to what comes next, which is the last thing it says."
    for r in rooms():
        prose = ["".join(c["source"]) for c in json.loads(r.path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown"]
        text = "\n".join(prose)
        assert re.search(r"^## What (to remember|we found)", text, re.M), f"{r.path.name}: what is there to remember?"
        assert re.search(r"^#+ Exercises", text, re.M), f"{r.path.name} has no exercises"
        assert re.search(r"^Next: .*\[[^\]]+\]\([^)]+\.ipynb\)", prose[-1], re.M), f"{r.path.name}: its last cell has to say where to go next"


# --- the site

@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    "A finished build of the site."
    if ready := os.environ.get("TRANSFORMER2_SITE"): return Path(ready)
    out = tmp_path_factory.mktemp("docs") / "html"
    run = subprocess.run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-c", "docs", ".", str(out)],
                         cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-4000:]
    return out


def pages(site: Path) -> list:
    "Every page as a path below the site."
    return sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html") if "_static" not in p.parts)


def test_every_room_has_a_page(site):
    missing = {"index.html", "docs/reference.html", "docs/internals.html", *(f"{r.doc}.html" for r in [start(), *rooms(), *tutorials()])} - set(pages(site))
    assert not missing
    for r in [start(), *rooms(), *tutorials()]:
        html = (site / f"{r.doc}.html").read_text(encoding="utf-8")
        assert r.colab in html, f"{r.doc} has no Colab link"
        for e in r.exports: assert not e.label or f'id="{e.label}"' in html, f"{r.doc} has no anchor for {e.name}"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def address(site):
    "The site, served on this machine."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class Browser:
    "Headless Chromium, driven through chromedriver's HTTP interface."
    def __init__(self, profile: Path):
        self.process = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        port = next(m[1] for line in self.process.stdout if (m := re.search(r"started successfully on port (\d+)", line)))
        self.url = f"http://127.0.0.1:{port}/session"
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        self.url += "/" + self.post("", capabilities={"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options,
                                                                      "goog:loggingPrefs": {"browser": "ALL"}}})["sessionId"]

    def post(self, path, **body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer: return json.load(answer)["value"]

    def open(self, url):
        "Returns when the page is whole; chromedriver alone may return before, on a busy machine."
        self.post("/url", url=url)
        for _ in range(300):
            if self.run("arguments[0]([document.readyState, location.href])") == ["complete", url]: return
            time.sleep(.1)
        raise TimeoutError(f"{url} did not load in half a minute")

    def run(self, script): return self.post("/execute/async", script=script, args=[])
    def cdp(self, cmd, **params): return self.post("/goog/cdp/execute", cmd=cmd, params=params)
    def complaints(self): return [f"{e['level']}: {e['message']}" for e in self.post("/se/log", type="browser") if e["level"] in ("SEVERE", "WARNING")]

    def close(self):
        try: urllib.request.urlopen(urllib.request.Request(self.url, method="DELETE"), timeout=30).close()
        finally: self.process.terminate(); self.process.wait(30)


LOOK = """
const done = arguments[arguments.length - 1];
const math = window.MathJax && MathJax.startup ? MathJax.startup.promise : Promise.resolve();
math.then(() => Promise.all([...document.images].map(i => { i.loading = "eager"; return i.decode().catch(() => null); }))).then(() => done({
  ids: [...document.querySelectorAll("[id]")].map(e => e.id),
  links: [...document.querySelectorAll("a[href]")].map(a => a.href),
  images: [...document.images].map(i => [i.getAttribute("src").slice(0, 80), i.naturalWidth, i.naturalHeight]),
  loaded: performance.getEntriesByType("resource").map(e => e.name),
  formulas: document.querySelectorAll(".math").length, typeset: document.querySelectorAll("mjx-container").length,
  broken: [...document.querySelectorAll("mjx-merror, [data-mjx-error]")].map(e => e.textContent),
}), e => done({error: String(e)}));
"""


def need_browser():
    if CHROMIUM and DRIVER: return
    reason = "chromium and chromedriver are not installed"
    pytest.fail(reason) if os.environ.get("TRANSFORMER2_REQUIRE_BROWSER") == "1" else pytest.skip(reason)


@pytest.fixture(scope="module")
def seen(site, address, tmp_path_factory) -> dict:
    "What Chromium saw on every page."
    need_browser()
    browser, found = Browser(tmp_path_factory.mktemp("profile")), {}
    try:
        for page in pages(site):
            browser.open(f"{address}/{page}")
            found[page] = {**browser.run(LOOK), "complaints": browser.complaints()}
    finally: browser.close()
    return found


def test_no_page_complains(seen, address):
    assert "index.html" in seen and len(seen) > 5
    for page, s in seen.items():
        assert "error" not in s and not s["complaints"], f"{page}: {s.get('error') or s['complaints']}"
        strangers = [u for u in s["loaded"] if not u.startswith((address, "data:", "blob:"))]
        assert not strangers, f"{page} loads {strangers}: the site has to work offline"


def test_every_formula_is_typeset(seen):
    for page, s in seen.items():
        assert not s["broken"], f"{page}: {s['broken']}"
        assert s["typeset"] >= s["formulas"], f"{page}: {s['formulas']} formulas, {s['typeset']} typeset"
    assert seen["nbs/01_svf.html"]["typeset"] > 10


def test_every_picture_has_a_size(seen, site):
    for page, s in seen.items():
        assert all(w > 0 and h > 0 for _, w, h in s["images"]), f"{page}: {s['images']}"
    figures = [src for src, _, _ in seen["index.html"]["images"] if "logo" not in src]
    assert figures, "the front door has lost its picture"


WIDE = """
const done = arguments[arguments.length - 1];
const math = window.MathJax && MathJax.startup ? MathJax.startup.promise : Promise.resolve();
math.then(() => setTimeout(() => {
  const boxes = {code: "div.cell pre, div.highlight pre", formula: '.bd-article mjx-container[display="true"]', picture: ".bd-article img"};
  const seen = {page: document.documentElement.scrollWidth - window.innerWidth, width: window.innerWidth, count: {}, wide: []};
  for (const [kind, selector] of Object.entries(boxes)) {
    const all = [...document.querySelectorAll(selector)].filter(e => e.offsetParent);
    seen.count[kind] = all.length;
    for (const e of all) {
      const edge = (e.closest(".bd-article") || document.body).getBoundingClientRect().right;
      if (e.scrollWidth > e.clientWidth + 1 && kind != "picture" || e.getBoundingClientRect().right > edge + 1)
        seen.wide.push(`${kind} ${e.scrollWidth} in ${e.clientWidth}: ${e.textContent.trim().slice(0, 60)}`);
      if (kind == "formula" && parseFloat(getComputedStyle(e).fontSize) < 8.5) seen.wide.push(`formula too small to read: ${getComputedStyle(e).fontSize}`);
    }
  }
  done(seen);
}, 150), e => done({error: String(e)}));
"""


@pytest.mark.parametrize("width", [1440, 390])
def test_nothing_is_clipped(site, address, width, tmp_path):
    "On a desktop and on a phone every code cell, formula and picture is as wide as its column or less, and no page scrolls sideways."
    need_browser()
    browser, clipped, count = Browser(tmp_path / "profile"), [], 0
    try:
        browser.cdp("Emulation.setDeviceMetricsOverride", width=width, height=1200, deviceScaleFactor=1, mobile=False)
        for page in pages(site):
            browser.open(f"{address}/{page}")
            s = browser.run(WIDE)
            assert "error" not in s and s["width"] == width, f"{page}: {s}"
            count += sum(s["count"].values())
            clipped += [f"{page}: {w}" for w in s["wide"]] + ([f"{page} scrolls sideways by {s['page']} px"] if s["page"] > 1 else [])
    finally: browser.close()
    assert count > 500 and not clipped, f"{len(clipped)} of {count} clipped at {width} px:\n" + "\n".join(clipped[:40])


CANVAS = """
const look = () => { const c = document.querySelector(".live-svd canvas"), d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
  return {width: c.width, grey: [...d].filter((_, i) => i % 4 == 0), says: document.querySelector(".live-svd output").textContent}; };
"""
PIXELS = CANVAS + """
const press = name => [...document.querySelectorAll(".live-svd button")].find(b => b.textContent.startsWith(name)).click();
const seen = {base: look()};
press("the first three"); seen.three = look();
const first = document.querySelector(".live-svd input");
press("base"); first.value = 0.5; first.dispatchEvent(new Event("input")); seen.half = look();
press("base"); seen.again = look();
first.focus();
arguments[0](seen);
"""


def test_the_live_figure_computes_what_it_says(address, tmp_path):
    "The picture under the sliders against numpy's SVD of the picture at z = 1."
    need_browser()
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(f"{address}/index.html")
        seen = browser.run(PIXELS)
        browser.cdp("Input.dispatchKeyEvent", type="rawKeyDown", key="ArrowLeft", code="ArrowLeft", windowsVirtualKeyCode=37)
        seen["keys"] = browser.run(CANVAS + "arguments[0](look())")
    finally: browser.close()
    W = {k: np.array(v["grey"], float).reshape(-1, v["width"]) for k, v in seen.items()}
    U, S, Vh = np.linalg.svd(W["base"], full_matrices=False)
    for name, z in dict(three=np.arange(len(S)) < 3, half=np.where(np.arange(len(S)) == 0, .5, 1)).items():
        want = np.clip((U * S * z) @ Vh, 0, 255)
        assert np.abs(W[name] - want).max() < 3, f"{name}: {np.abs(W[name] - want).max()} grey levels off"      # the base was rounded to 256 levels
        share = np.sqrt((((z - 1) * S) ** 2).sum() / (S ** 2).sum())
        assert abs(float(seen[name]["says"].split("=")[1]) - share) < .003
    assert (W["again"] == W["base"]).all() and np.ptp(W["base"]) > 200
    assert np.abs(W["base"] - 255 * picture()).max() <= .51, "docs/live.py draws another picture"
    assert np.abs(W["keys"] - 255 * turned(np.where(np.arange(len(S)) == 0, .99, 1))).max() <= .51, "a key moves z by one hundredth"


def test_without_a_script_a_picture_stands_there(site):
    html = (site / "index.html").read_text(encoding="utf-8")
    source = re.search(r'class="live-svd"><img src="([^"]+)"', html)[1]
    assert (site / source).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_readers_system(address, scheme, tmp_path):
    need_browser()
    browser = Browser(tmp_path / "profile")
    try:
        browser.cdp("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=scheme)])
        browser.open(f"{address}/nbs/00_svd.html")
        assert browser.run("arguments[0](document.documentElement.dataset.theme)") == scheme
    finally: browser.close()


def test_every_page_says_what_it_is_about(site, settings):
    for r in rooms():
        html = (site / f"{r.doc}.html").read_text(encoding="utf-8")
        about = re.search(r'<meta name="description" content="([^"]+)">', html)
        assert about and len(about[1]) > 15, f"{r.doc} has no description"
        assert f'{settings["doc_host"]}{settings["doc_baseurl"]}/_static/card.png' in html
    assert (site / "_static/card.png").stat().st_size < 100_000


def test_no_link_inside_the_site_is_broken(seen, site, address):
    broken = set()
    for page, s in seen.items():
        for link in s["links"]:
            if not link.startswith(address): continue
            url, anchor = urldefrag(link)
            target = unquote(urlsplit(url).path).lstrip("/") or "index.html"
            if not (site / target).is_file(): broken.add(f"{page} -> {target}")
            elif anchor and target in seen and unquote(anchor) not in seen[target]["ids"]: broken.add(f"{page} -> {target}#{anchor}")
    assert not broken, "\n".join(sorted(broken))
