# SPDX-License-Identifier: Apache-2.0
"""The card in a real browser, over real engines: alive, readable by everybody, deaf to what peers call themselves.

make test-card; skipped with a reason where Chromium, playwright or npm's packages are not to be had.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="make test-card installs it (locks/card.txt)")

from fastapi import FastAPI, Response
from playwright.sync_api import Browser, Page, Route, expect

from integration_tests.card_browser import browser, chromium, serving
from sage_kv_connector.integrations.sage.gateway import create_app as create_gateway
from sage_kv_connector.integrations.sage.gateway import mount_card
from sage_kv_connector.telemetry.reading.card import page as page_module
from sage_kv_connector.telemetry.reading.card import router as router_module
from sage_kv_connector.telemetry.reading.exporter import create_app as create_exporter
from sage_kv_connector.telemetry.reading.sources import Found
from sage_kv_connector.telemetry.recording.publishing import DIRECTORY_ENV
from tests.telemetry.card_traffic import Traffic, traffic

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = "<img src=x onerror=window.pwned=1>"

if chromium() is None:
    pytest.skip("no Chromium is installed (Debian/Ubuntu: apt-get install chromium)", allow_module_level=True)


@pytest.fixture(scope="module")
def node_modules() -> Path:
    """Where npm's packages are; they bring axe, and the charts are built of them."""
    build = [sys.executable, "-m", "scripts.build_card"]
    subprocess.run(build, cwd=ROOT, check=True)
    done = subprocess.run([*build, "--node-modules"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(done.stderr.strip())
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    with browser() as made:
        yield made


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traffic]:
    """They hand KV over all the time, and publish what they count; one has a name that is HTML."""
    stop = threading.Event()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv(DIRECTORY_ENV, str(tmp_path_factory.mktemp("telemetry")))
        made = stack.enter_context(traffic(HOSTILE))
        made.move()
        made.fail()

        def go() -> None:
            while not stop.wait(0.2):
                made.move()

        thread = threading.Thread(target=go)
        thread.start()
        try:
            yield made
        finally:
            stop.set()
            thread.join()


@pytest.fixture(scope="module")
def where(engines: Traffic, node_modules: Path) -> Iterator[str]:
    with serving(create_exporter(engines.source)) as url:
        yield f"{url}/kv-transport/"


Opened = Callable[..., Page]


@pytest.fixture
def opened(chrome: Browser) -> Iterator[Opened]:
    """Pages that said nothing to the console and threw nothing, or the test fails."""
    contexts, said = [], []

    def failed(request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # which a card does that goes
            said.append(f"{request.url}: {request.failure}")

    def open_page(url: str, quiet: bool = True, **options: Any) -> Page:
        context = chrome.new_context(
            **{"locale": "en-US", "viewport": {"width": 1280, "height": 900}, **options}
        )
        contexts.append(context)
        page = context.new_page()
        if quiet:
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("requestfailed", failed)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def row(page: Page, panel: str, text: str) -> Any:
    return page.locator(f"section.{panel} tbody tr", has_text=text).first


def test_numbers_live_and_charts_grow(where: str, opened: Opened) -> None:
    page = opened(where)
    expect(page.get_by_role("status")).to_have_text("Live")
    expect(page.get_by_role("heading", name="KV Transport")).to_be_visible()
    link = row(page, "links", "decode-1[0]")
    expect(link).to_contain_text("shm")
    expect(link.locator("td").nth(2)).to_have_text(re.compile(r"[\d.]+ [KM]iB/s"), timeout=10_000)
    before = link.locator("td").last.inner_text()
    expect(link.locator("td").last).not_to_have_text(before, timeout=10_000)
    expect(page.locator(".throughput canvas")).to_be_visible(timeout=10_000)
    expect(page.locator(".throughput [role=img]")).to_have_attribute(
        "aria-label", re.compile("Chart: .*iB/s")
    )
    expect(row(page, "failures", "unknown_transfer")).to_contain_text(
        "Prefill has no such transfer on offer."
    )
    expect(row(page, "choices", "decode-1[0]")).to_contain_text("packing: hnd here, nhd at the peer")
    expect(row(page, "hot", "512")).to_be_visible()
    expect(row(page, "conversion", "fp8_e4m3")).to_contain_text("×")


def test_what_a_peer_calls_itself_is_text(where: str, opened: Opened) -> None:
    page = opened(where)
    peer = page.locator("section.links tbody td[title]", has_text="<img").first
    expect(peer).to_have_attribute("title", f"{HOSTILE}[0]")
    expect(page.locator("section.transfers tbody td[title]", has_text="<img").first).to_be_visible()
    expect(page.locator(".throughput .u-label", has_text="<img").first).to_be_visible(timeout=10_000)
    assert page.locator("img").count() == 0
    assert page.evaluate("window.pwned") is None


def test_scripts_that_get_in_all_the_same_do_not_run(where: str, opened: Opened) -> None:
    """The policy is in force: what the card's own code must never do is refused by the browser."""
    page = opened(where, quiet=False)
    page.evaluate("document.body.append(Object.assign(document.createElement('img'), {src: 'x'}))")
    refused = page.evaluate(
        f"try {{ document.body.innerHTML = {HOSTILE!r}; '' }} catch (error) {{ error.name }}"
    )
    assert refused == "TypeError"
    inline = "const s = document.createElement('script'); s.textContent = 'window.pwned = 1'; document.body.append(s)"
    with pytest.raises(Exception, match=r"TrustedScript|Trusted Types"):
        page.evaluate(inline)
    assert page.evaluate("window.pwned") is None


def test_languages_and_themes_are_chosen_and_kept(where: str, opened: Opened) -> None:
    page = opened(where, locale="zh-CN", color_scheme="dark")
    expect(page.get_by_role("heading", name="KV 传输")).to_be_visible()
    expect(row(page, "failures", "unknown_transfer")).to_contain_text("prefill 没有提供这样的传输。")
    assert (
        page.locator("article").evaluate("card => getComputedStyle(card).backgroundColor")
        == "rgb(20, 26, 34)"
    )
    page.get_by_label("主题").select_option("light")
    assert (
        page.locator("article").evaluate("card => getComputedStyle(card).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    page.get_by_label("语言").focus()
    page.get_by_label("语言").select_option("en")
    expect(page.get_by_role("heading", name="Last transfers")).to_be_visible()
    expect(page.get_by_label("Language")).to_be_focused()
    page.reload()
    expect(page.get_by_role("heading", name="Last transfers")).to_be_visible()
    expect(page.get_by_label("Theme")).to_have_value("light")


def test_no_card_is_seen_without_its_style(where: str, opened: Opened) -> None:
    """However late style sheets come: not at the start, and not when a choice makes the card anew."""
    page = opened("about:blank")
    asked: list[str] = []

    def late(route: Route) -> None:
        asked.append(route.request.url.rpartition("/")[2])
        time.sleep(0.3)
        route.continue_()

    page.route("**/*.css", late)
    page.add_init_script(
        "window.looks = new Set(); (function look() {"
        "  const card = document.querySelector('kv-transport-card')?.shadowRoot?.querySelector('article');"
        "  if (card?.checkVisibility()) window.looks.add(getComputedStyle(card).backgroundColor);"
        "  requestAnimationFrame(look) })()"
    )
    page.goto(where)
    expect(page.locator(".throughput canvas")).to_be_visible(timeout=10_000)
    page.get_by_label("Theme").select_option("dark")
    page.get_by_label("Language").select_option("zh")
    expect(page.get_by_role("heading", name="KV 传输")).to_be_visible()
    expect(page.locator(".throughput canvas")).to_be_visible(timeout=10_000)
    page.wait_for_timeout(500)
    assert set(page.evaluate("[...window.looks]")) == {"rgb(255, 255, 255)", "rgb(20, 26, 34)"}
    assert sorted(asked) == ["card.css", "charts.css", "page.css"], "each is asked for once"


def test_a_card_whose_style_cannot_be_had_is_shown_all_the_same(where: str, opened: Opened) -> None:
    page = opened("about:blank", quiet=False)
    page.route("**/card.css", lambda route: route.abort())
    page.goto(where)
    expect(row(page, "transfers", "req-")).to_be_visible()


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_no_fault(
    where: str, opened: Opened, node_modules: Path, language: str, theme: str, width: int
) -> None:
    page = opened(
        where, locale=language, color_scheme=theme, bypass_csp=True, viewport={"width": width, "height": 900}
    )
    expect(page.locator(".throughput canvas")).to_be_visible(timeout=10_000)
    page.locator("summary").first.click()
    page.evaluate((node_modules / "axe-core" / "axe.min.js").read_text())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations', 'passes']})")
    assert [
        (one["id"], one["impact"], [node["html"][:100] for node in one["nodes"]])
        for one in found["violations"]
    ] == []
    assert len(found["passes"]) > 20
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0, "the page itself must not scroll sideways"


def focused(page: Page) -> str:
    return str(
        page.evaluate(
            "(() => { let at = document.activeElement; while (at?.shadowRoot) at = at.shadowRoot.activeElement;"
            "return at ? `${at.tagName.toLowerCase()} ${at.id || at.getAttribute('aria-label') || ''}`.trim() : '' })()"
        )
    )


def test_everything_is_reached_and_used_by_keyboard(where: str, opened: Opened) -> None:
    page = opened(where)
    expect(row(page, "transfers", "req-")).to_be_visible()
    page.get_by_role("button", name="Pause").focus()
    reached = [focused(page)]
    for _ in range(60):
        page.keyboard.press("Tab")
        if focused(page).startswith("body") or not focused(page):
            break
        reached.append(focused(page))
    for wanted in (
        "button pause",
        "select lang",
        "select theme",
        "div Links",
        "div Failures and alerts",
        "div Last transfers",
    ):
        assert wanted in reached, (wanted, reached)
    assert reached.count("summary") == page.locator("section.transfers tbody tr").count() == 20
    ring = (
        "getComputedStyle(document.querySelector('kv-transport-card').shadowRoot.activeElement).outlineStyle"
    )
    page.get_by_role("button", name="Pause").focus()
    page.keyboard.press("Tab")
    assert page.evaluate(ring) == "solid"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("Paused")
    summary = page.locator("section.transfers summary").nth(3)
    summary.focus()
    page.keyboard.press("Enter")
    stages = page.locator("section.transfers details[open] li")
    expect(stages.first).to_be_visible()
    said = page.locator("section.transfers details[open] .bar").get_attribute("aria-label")
    assert said and said.split(", ") == stages.all_inner_texts()


def test_the_list_waits_while_somebody_reads_it(where: str, opened: Opened) -> None:
    page = opened(where)
    names = page.locator("section.transfers tbody th")
    page.locator("section.transfers summary").first.press("Enter")
    before = names.all_inner_texts()
    sent = row(page, "links", "decode-1[0]").locator("td").last.inner_text()
    expect(row(page, "links", "decode-1[0]").locator("td").last).not_to_have_text(sent, timeout=10_000)
    assert names.all_inner_texts() == before and focused(page) == "summary"
    page.get_by_role("button", name="Pause").focus()
    page.wait_for_timeout(1500)
    assert names.all_inner_texts() == before, "open"
    page.locator("section.transfers summary").first.press("Enter")
    page.get_by_role("button", name="Pause").focus()
    expect(names.first).not_to_have_text(before[0], timeout=10_000)


def test_a_new_failure_is_told_to_screen_readers(engines: Traffic, where: str, opened: Opened) -> None:
    page = opened(where)
    expect(page.get_by_role("status")).to_have_text("Live")
    told = page.locator("[aria-live=polite]")
    expect(told).to_have_text("")
    engines.fail()
    expect(told).to_have_text("New failures: 1")


def test_pause_stops_asking_and_resume_goes_on(where: str, opened: Opened) -> None:
    page = opened(where)
    asked: list[str] = []
    expect(page.get_by_role("status")).to_have_text("Live")
    page.get_by_role("button", name="Pause").click()
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(2500)
    assert asked == []
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_role("status")).to_have_text("Live")
    page.wait_for_timeout(1500)
    assert asked


def test_a_server_that_fails_is_said_and_comes_back(
    engines: Traffic, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_module, "FRESH", 0.0)
    broken = threading.Event()

    def source() -> Found:
        if broken.is_set():
            raise PermissionError(f"{HOSTILE} is not ours")
        return engines.source()

    app = FastAPI()
    mount_card(app, source)
    with serving(app) as url:
        page = opened(f"{url}/kv-transport/", quiet=False)
        expect(page.get_by_role("status")).to_have_text("Live")
        broken.set()
        expect(page.get_by_role("status")).to_contain_text(
            f"PermissionError: {HOSTILE} is not ours", timeout=10_000
        )
        expect(row(page, "links", "decode-1[0]")).to_be_visible()
        broken.clear()
        expect(page.get_by_role("status")).to_have_text("Live", timeout=10_000)
        assert page.locator("img").count() == 0


def test_before_the_first_engine_it_says_what_to_do(opened: Opened) -> None:
    app = FastAPI()
    mount_card(app, lambda: Found([]))
    with serving(app) as url:
        page = opened(f"{url}/kv-transport/")
        expect(page.locator(".engines")).to_contain_text("No engine with telemetry runs on this machine")
        expect(page.locator("section.links .empty")).to_have_text("No link yet: nothing was handed over.")


def test_without_npm_tables_have_it_all(
    engines: Traffic, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "CHARTS", ("never-built",))
    app = FastAPI()
    mount_card(app, engines.source)
    with serving(app) as url:
        page = opened(f"{url}/kv-transport/")
        expect(row(page, "links", "decode-1[0]").locator("td").nth(2)).to_contain_text("iB/s", timeout=10_000)
        assert page.locator("canvas").count() == 0
        expect(page.locator(".charts")).to_contain_text("This build has no charts")


def test_another_page_of_the_same_site_embeds_it(engines: Traffic, opened: Opened) -> None:
    app = FastAPI()
    mount_card(app, engines.source)

    @app.get("/dashboard")
    def dashboard() -> Response:
        return Response(
            "<!doctype html><html lang=en><title>Mine</title><link rel=icon href=data:,>"
            "<style>* { color: red !important }</style>"
            "<script type=module src=/kv-transport/card.js></script><main><h1>Mine</h1>"
            "<kv-transport-card src=/kv-transport/card.json lang=zh theme=dark>"
            "</kv-transport-card></main>",
            media_type="text/html",
            headers={"Content-Security-Policy": "script-src 'self'"},
        )

    with serving(app) as url:
        page = opened(f"{url}/dashboard", locale="en-US")
        expect(page.get_by_role("heading", name="KV 传输")).to_be_visible()
        expect(row(page, "links", "decode-1[0]")).to_be_visible()
        card = page.locator("kv-transport-card article")
        assert card.evaluate("card => getComputedStyle(card).color") == "rgb(230, 235, 241)", (
            "their style stays out"
        )
        page.evaluate("document.querySelector('kv-transport-card').setAttribute('lang', 'en')")
        expect(page.get_by_role("heading", name="KV Transport")).to_be_visible()
        page.evaluate("document.querySelector('kv-transport-card').remove()")
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.wait_for_timeout(1500)
        assert asked == [], "a card that was taken away asks no more"


def test_the_real_gateway_serves_it(engines: Traffic, opened: Opened) -> None:
    """By one call, over the sockets at which the engines publish."""
    pytest.importorskip("sagellm_gateway", reason="the SAGE packages want Python 3.11")
    with serving(create_gateway()) as url:
        page = opened(f"{url}/kv-transport")
        expect(page.get_by_role("status")).to_have_text("Live")
        expect(row(page, "links", "decode-1[0]")).to_be_visible()
        expect(page.locator(".throughput canvas")).to_be_visible(timeout=10_000)
        assert page.request.get(f"{url}/health").ok
