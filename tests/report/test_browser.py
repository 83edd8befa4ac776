"""The page in a real browser: headless Chromium, driven by Playwright."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spectralnorm.report import build_report

playwright = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the path, or its path in $CHROMIUM")

WIDE, PHONE = (1440, 900), (390, 844)
Open = Callable[..., Any]

# Elements that reach beyond the window, unless something that clips or scrolls holds them.
STICKING_OUT = """() => {
  const held = (node) => {
    for (let up = node.parentElement; up && up !== document.body; up = up.parentElement)
      if (getComputedStyle(up).overflowX !== "visible") return true;
    return false;
  };
  return [...document.querySelectorAll("body *")].filter((node) => {
    const box = node.getBoundingClientRect();
    if (!box.width || node.matches(".skip, .unseen, input")) return false;
    return (box.right > document.documentElement.clientWidth + 0.5 || box.left < -0.5) && !held(node);
  }).map((node) => node.outerHTML.slice(0, 120));
}"""
CLIPPED_TEXT = """() => [...document.querySelectorAll(".plot svg text")].filter((text) => {
  const box = text.getBoundingClientRect(), frame = text.ownerSVGElement.closest(".chart").getBoundingClientRect();
  return box.left < frame.left || box.right > frame.right;
}).map((text) => text.textContent)"""


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # In containers Chromium runs as root, which its sandbox refuses; the page is our own.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def report(finished_run: Path) -> Path:
    return build_report(finished_run)


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Open a report; the test fails if the page logs, throws, or asks for anything but itself."""
    complaints: list[str] = []
    contexts = []

    def open_page(report: Path, size: tuple[int, int] = WIDE, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("request", lambda request: requested(request.url))

        def requested(url: str) -> None:
            if url != report.as_uri() and not url.startswith("data:"):
                complaints.append(f"request: {url}")

        page.goto(report.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def shown(page: Any) -> str:
    return page.locator(".stage img").get_attribute("src")


def frames(page: Any) -> list[str]:
    return page.locator(".film img").evaluate_all("images => images.map((image) => image.src)")


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("script", [True, False], ids=["script", "no-script"])
def test_nothing_sticks_out_of_the_window(
    open_page: Open, report: Path, size: tuple[int, int], scheme: str, script: bool
) -> None:
    page = open_page(report, size, color_scheme=scheme, java_script_enabled=script)
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.evaluate(STICKING_OUT) == []
    assert page.evaluate(CLIPPED_TEXT) == []


def test_every_image_can_be_decoded_and_every_chart_is_drawn(open_page: Open, report: Path) -> None:
    page = open_page(report)
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    for chart in page.locator("[data-chart]").all():
        assert chart.locator("svg path.curve").count() > 0
        assert "NaN" not in chart.locator("svg").evaluate("svg => svg.outerHTML")


def test_pixels_are_scaled_without_blur_and_samples_are_large(open_page: Open, report: Path) -> None:
    image = open_page(report).locator(".generated .sheet img").first
    assert image.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    assert image.evaluate("image => image.clientWidth / image.naturalWidth") >= 2


def test_the_strip_begins_with_the_last_samples_and_follows_the_slider(open_page: Open, report: Path) -> None:
    page = open_page(report)
    every = frames(page)
    assert len(set(every)) == len(every) == 17
    assert shown(page) == every[-1]
    place = "stage => [stage.offsetTop, stage.offsetLeft, stage.offsetWidth, stage.offsetHeight]"
    before = page.locator(".stage").evaluate(place)
    page.locator("#strip-slider").fill("3")
    assert shown(page) == every[3]
    assert page.locator("#strip-step").text_content() == "Step 195"
    page.locator("#strip-slider").press("ArrowRight")
    assert shown(page) == every[4]
    assert page.locator(".stage").evaluate(place) == before


def test_the_strip_follows_the_keyboard_and_the_thumbnails(open_page: Open, report: Path) -> None:
    page = open_page(report)
    every = frames(page)
    stage = page.locator(".stage")
    for key, index in (("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 16)):
        stage.press(key)
        assert shown(page) == every[index]
    page.locator(".film button").nth(5).click()
    assert shown(page) == every[5]
    assert page.locator("#strip-slider").input_value() == "5"
    assert page.locator(".film [aria-current]").count() == 1


def test_the_strip_plays_from_the_start_to_the_end_and_can_be_paused(open_page: Open, report: Path) -> None:
    page = open_page(report)
    every = frames(page)
    play = page.locator("#strip-play")
    play.click()
    assert shown(page) == every[0]
    playwright.expect(page.locator(".stage img")).not_to_have_attribute("src", every[0])
    play.click()
    assert play.get_attribute("aria-label") == "Play"
    paused = shown(page)
    page.wait_for_timeout(500)
    assert shown(page) == paused != every[0]
    page.locator(".stage").press(" ")
    playwright.expect(page.locator("#strip-slider")).to_have_value("16", timeout=20_000)
    playwright.expect(play).to_have_attribute("aria-label", "Play")
    assert shown(page) == every[-1]


@pytest.mark.parametrize(("scheme", "other"), [("light", "dark"), ("dark", "light")])
def test_the_theme_follows_the_system_until_it_is_switched(
    open_page: Open, report: Path, scheme: str, other: str
) -> None:
    page = open_page(report, color_scheme=scheme)
    background = "getComputedStyle(document.body).backgroundColor"
    colors = {"light": "rgb(250, 249, 246)", "dark": "rgb(18, 19, 21)"}
    assert page.evaluate(background) == colors[scheme]
    page.locator("#theme").click()
    assert page.evaluate(background) == colors[other]
    page.reload()
    assert page.evaluate(background) == colors[other]
    page.locator("#theme").click()
    assert page.evaluate(background) == colors[scheme]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(open_page: Open, report: Path, scheme: str) -> None:
    page = open_page(report, color_scheme=scheme)
    ratios = page.evaluate("""() => {
      const probe = document.body.appendChild(document.createElement("i"));
      const light = (name) => {
        probe.style.color = `var(${name})`;
        const parts = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
          .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
      };
      const pairs = [["--ink", "--paper"], ["--soft", "--paper"], ["--soft", "--surface"], ["--accent", "--wash"],
        ["--warn", "--warn-wash"], ["--accent-ink", "--accent"], ["--paper", "--ink"]];
      return pairs.map(([front, back]) => {
        const [low, high] = [light(front), light(back)].sort((one, other) => one - other);
        return [`${front} on ${back}`, (high + 0.05) / (low + 0.05)];
      });
    }""")
    assert [pair for pair in ratios if pair[1] < 4.5] == []


def test_real_images_can_be_shown_in_place_of_generated_ones(open_page: Open, report: Path) -> None:
    page = open_page(report)
    page.get_by_text("Real, to compare").click()
    assert page.locator(".versus .real").is_visible()
    assert not page.locator(".versus .generated").is_visible()


def test_pointing_at_a_curve_names_it_and_tells_its_value(open_page: Open, report: Path) -> None:
    page = open_page(report)
    chart = page.locator("[data-chart=spectra]")
    chart.locator("svg").hover(position={"x": 400, "y": 150})
    near = chart.locator(".tip .near")
    assert near.is_visible()
    assert near.text_content().startswith(("features.", "head."))
    assert chart.locator(".series:not(.faded)").count() == 1


def test_values_can_be_read_with_the_keyboard(open_page: Open, report: Path) -> None:
    page = open_page(report)
    chart = page.locator("[data-chart=loss]")
    chart.locator("svg").press("End")
    assert chart.locator(".tip").text_content().startswith("step 2,400")
    chart.locator("svg").press("Home")
    assert chart.locator(".tip").text_content().startswith("step 10")


def test_a_curve_can_be_hidden_and_shown_again(open_page: Open, report: Path) -> None:
    page = open_page(report)
    chart = page.locator("[data-chart=loss]")
    key = chart.get_by_role("button", name="discriminator")
    for count, pressed in ((1, "false"), (2, "true")):
        key.click()
        assert chart.locator("path.curve").count() == count
        assert key.get_attribute("aria-pressed") == pressed


def test_scale_abscissa_and_smoothing_can_be_changed(open_page: Open, report: Path) -> None:
    page = open_page(report)
    sigma = page.locator("[data-chart=sigma]")
    linear = sigma.locator("path.curve").first.get_attribute("d")
    sigma.get_by_role("button", name="log").click()
    assert sigma.locator("path.curve").first.get_attribute("d") != linear
    page.get_by_text("time", exact=True).click()
    assert sigma.get_by_text("seconds of training").count() == 1
    rough = page.locator("[data-chart=loss] path.curve").first.get_attribute("d")
    page.locator("#smoothing").fill("10")
    assert page.locator("[data-chart=loss] path.curve").first.get_attribute("d") != rough
    page.locator("#smoothing").fill("0")
    assert page.locator("#smoothing-text").text_content() == "off"


def test_without_scripts_samples_and_numbers_are_there_and_dead_controls_are_not(open_page: Open, report: Path) -> None:
    page = open_page(report, java_script_enabled=False)
    assert page.locator(".generated img").first.is_visible()
    assert page.locator(".film img").first.is_visible()
    assert page.locator("[data-chart=sigma] table").is_visible()
    for control in ("#theme", "#strip-slider", "#strip-play", "#smoothing"):
        assert not page.locator(control).is_visible()


def test_a_printed_page_is_light_and_without_controls(open_page: Open, report: Path) -> None:
    page = open_page(report, color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator(".bar").is_visible()
    assert page.locator("[data-chart=loss] svg").is_visible()


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
@pytest.mark.parametrize("num_records", [0, 1, 2, 3])
def test_partial_runs_open_without_complaint(
    open_page: Open,
    make_run: Callable[..., Path],
    tmp_path: Path,
    synthetic: SimpleNamespace,
    size: tuple[int, int],
    num_records: int,
) -> None:
    grid = synthetic.save_grid(tmp_path / "run", "samples", 0, 8, 8)
    records = [synthetic.session(), grid, synthetic.scalars(10)][:num_records]
    page = open_page(build_report(make_run(records)), size)
    assert page.evaluate(STICKING_OUT) == []
    assert page.get_by_text("What this run does not show").is_visible()


def test_long_names_wrap_on_a_phone(open_page: Open, make_run: Callable[..., Path], synthetic: SimpleNamespace) -> None:
    name = "a_very_long_name_without_a_single_space_" * 4
    scalars = synthetic.scalars(10)
    scalars.values[f"sigma/{name}"] = 1.0
    data = {**synthetic.data, "name": name, "unreadable": [{"file": name, "reason": name}], "classes": {name: 10}}
    config = {**synthetic.config, "recipe": name, "data": name}
    page = open_page(build_report(make_run([synthetic.session(), scalars], config, data)), PHONE)
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.evaluate(STICKING_OUT) == []
