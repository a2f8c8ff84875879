"""report.html in a real headless Chromium: curves, rollouts, mouse and keyboard, and no script error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from reason_rl.report.log import RunLog
from reason_rl.report.page import write_report
from tests.reason_rl.report.chromium import Chromium, find_chromium
from tests.reason_rl.report.fake_run import CAUSE, HOSTILE, write_fake_run

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no chromium, chromium-browser or google-chrome on PATH"),
]
WIDTHS = (320, 390, 768, 1280)
CHARTS = {
    "pretrain": ["Loss", "Learning rate"],
    "grpo": ["Accuracy", "Thinking length", "Reward and its parts", "Samples that think", "Does thinking pay?", "pass@k", "Format",
             "Completion length", "Entropy", "KL", "Clip fractions", "Logprob gap", "Ratio", "Groups without signal", "Loss",
             "Gradient norm", "Loss tokens", "Time per phase", "Throughput", "Evaluations"],
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_fake_run(tmp_path_factory.mktemp("runs") / "program"))


def assert_no_error(browser: Chromium) -> None:
    assert browser.js("document.documentElement.dataset.errors") == ""
    assert browser.js("document.documentElement.dataset.ready") == "true"
    said = [e for e in browser.events if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert not said
    asked = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert asked and all(url.startswith(("file:", "data:", "about:")) for url in asked)


def titles(browser: Chromium) -> dict[str, list[str]]:
    """{heading of a stage: its charts}"""
    return dict(browser.js("""Object.fromEntries([...document.querySelectorAll('.stage')].map(stage => [
        stage.querySelector('h2').textContent,
        [...stage.querySelectorAll('[data-chart]')].map(figure => figure.dataset.chart)]))"""))


def test_every_chart_is_drawn_with_its_points(browser: Chromium, page: Path) -> None:
    browser.open(page)
    assert_no_error(browser)
    assert titles(browser) == {"Stage 1 of 2: pretrain": CHARTS["pretrain"], "Stage 2 of 2: grpo": CHARTS["grpo"]}
    drawn = browser.js("[...document.querySelectorAll('[data-chart]')].map("
                       "f => [f.dataset.chart, [...f.querySelectorAll('path')].map(p => p.getAttribute('d'))])")
    for name, paths in drawn:
        assert paths, name
        for path in paths:
            assert path.count("L") >= 4 and "NaN" not in path and "undefined" not in path, (name, path[:80])
    entropy = max(dict(drawn)["Entropy"], key=lambda d: -d.count("Z"))
    assert entropy.count("L") == 89  # 90 steps, 90 points


def test_curves_are_inside_their_plots_and_rise_with_accuracy(browser: Chromium, page: Path) -> None:
    browser.open(page)
    inside = browser.js(
        "[...document.querySelectorAll('.plot')].every(s => { const v = s.viewBox.baseVal; "
        "return [...s.querySelectorAll('path')].every(p => { const b = p.getBBox(); return b.x >= 0 && "
        "b.y >= -1 && b.x + b.width <= v.width + 1 && b.y + b.height <= v.height + 1; }); })")
    assert inside
    heights = browser.js("[...document.querySelectorAll('[data-chart=Accuracy] .dot')].map(d => +d.getAttribute('cy'))")
    assert len(heights) == 10 and heights[0] > heights[1] > heights[-1]  # SVG's y points down


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_window_needs_sideways_scrolling(browser: Chromium, page: Path, width: int, scheme: str) -> None:
    browser.open(page, width=width, scheme=scheme)
    assert_no_error(browser)
    assert browser.js("document.documentElement.scrollWidth") <= width
    bright = browser.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).every(v => v > 99)")
    assert bright == (scheme == "light")


def test_hovering_a_chart_shows_values_and_moves_the_cursor_of_its_stage(browser: Chromium, page: Path) -> None:
    browser.open(page)
    box = browser.js("(() => { const p = document.querySelector('[data-chart=Accuracy] .plot'); p.scrollIntoView(); "
                     "const b = p.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; })()")
    resting = browser.js("document.querySelector('[data-chart=Entropy] .legend b').textContent")
    browser.move_mouse(box[0] + box[2] * 0.2, box[1] + box[3] / 2)
    tip = browser.js("document.getElementById('tip').innerText")
    assert tip.startswith("step ") and "held-out" in tip and "%" in tip
    assert browser.js("document.querySelectorAll('#stage-2 .plot g[visibility=visible] .cursor').length") > 15
    assert browser.js("document.querySelectorAll('#stage-1 .plot g[visibility=visible]').length") == 0
    assert browser.js("document.querySelector('[data-chart=Entropy] .legend b').textContent") != resting
    browser.move_mouse(2, 2)
    assert browser.js("document.getElementById('tip').hidden")
    assert browser.js("document.querySelector('[data-chart=Entropy] .legend b').textContent") == resting


def test_arrow_keys_walk_along_a_focused_chart(browser: Chromium, page: Path) -> None:
    browser.open(page)
    browser.js("document.querySelector('[data-chart=Entropy] .plot').focus()")
    for _ in range(3):
        browser.press("ArrowRight")
    assert browser.js("document.querySelector('#tip .head').textContent") == "step 3"
    browser.press("Escape")
    assert browser.js("document.getElementById('tip').hidden")


def test_the_hash_chooses_step_group_sample_and_colour(browser: Chromium, page: Path) -> None:
    browser.open(page, "#step=20&group=2&sample=3&colour=logprob")
    assert_no_error(browser)
    state = browser.js("[document.getElementById('step-select').selectedOptions[0].textContent, VIEW.group, "
                       "VIEW.sample, document.getElementById('colour-logprob').checked]")
    assert state == ["20", 2, 3, True]
    shown = browser.js("[...document.querySelectorAll('.token')].map(t => t.textContent)")
    assert shown == browser.js("DATA.rollouts[0].steps[2].groups[2].samples[3].tokens") and shown[0] == "<think>"
    browser.open(page, "#step=1&group=0&sample=7")
    assert_no_error(browser)
    assert CAUSE in browser.js("document.getElementById('verdict').textContent")
    browser.open(page, "#step=999&group=x&sample=-5&colour=pink")
    assert_no_error(browser)
    assert browser.js("[VIEW.group, VIEW.sample, VIEW.colour]") == [0, 0, "advantage"]


def test_colour_is_the_advantage_for_all_tokens_or_each_tokens_own_logprob(browser: Chromium, page: Path) -> None:
    browser.open(page, "#step=10&group=0")
    colours = "[...new Set([...document.querySelectorAll('.token')].map(t => getComputedStyle(t).backgroundColor))]"
    by_sign = {}
    for number in range(8):
        browser.js(f"go({{sample: {number}}})")
        (one,) = browser.js(colours)
        by_sign[browser.js("Math.sign(sample().advantage)")] = one
    assert len(by_sign) == 2 and by_sign[1] != by_sign[-1]
    longest = browser.js("group().samples.reduce((b, s, i, all) => s.tokens.length > all[b].tokens.length ? i : b, 0)")
    browser.js(f"go({{sample: {longest}}})")
    browser.click("label[for=colour-logprob]")
    assert len(browser.js(colours)) > 3
    assert "colour=logprob" in browser.js("location.hash")


def test_a_tokens_tip_holds_logprob_probability_and_advantage(browser: Chromium, page: Path) -> None:
    browser.open(page, "#step=10")
    spot = browser.js("(() => { const t = document.querySelector('.token'); t.scrollIntoView({block: 'center'}); "
                      "const b = t.getBoundingClientRect(); return [b.x + 5, b.y + 8]; })()")
    browser.move_mouse(*spot)
    words = browser.js("document.getElementById('tip').innerText").split("\n")
    logprob = browser.js("sample().logprobs[0]")
    assert words[0] == "“<think>”" and f"{logprob:.4f} nats" in words
    assert browser.js("(Math.exp(sample().logprobs[0]) * 100).toFixed(2) + '%'") in words and "advantage" in words


def test_mouse_and_keyboard_move_through_steps_groups_samples_and_tokens(browser: Chromium, page: Path) -> None:
    browser.open(page, "#step=10&group=0&sample=0")
    state = "[steps()[VIEW.step].step, VIEW.group, VIEW.sample, VIEW.token]"
    browser.click("#step-on")
    assert browser.js(state) == [20, 0, 0, None]
    browser.click("#group-on")
    browser.click("#sample-2")
    assert browser.js(state) == [20, 1, 2, None]
    browser.js("document.getElementById('samples').focus()")
    browser.press("ArrowDown")
    assert browser.js(state) == [20, 1, 3, None]
    browser.press("[")
    browser.press("g")
    assert browser.js(state) == [10, 2, 0, None]
    browser.js("document.getElementById('tokens').focus()")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert browser.js(state) == [10, 2, 0, 1]
    assert browser.js("document.getElementById('token-line').textContent").startswith("token 2 ")
    browser.press("c")
    assert browser.js("VIEW.colour") == "logprob"
    assert_no_error(browser)


def test_hostile_completions_are_shown_and_never_run(browser: Chromium, tmp_path: Path) -> None:
    browser.open(write_report(write_fake_run(tmp_path / "program", hostile=True)))
    assert_no_error(browser)
    assert not [e for e in browser.events if e.get("method") == "Page.javascriptDialogOpening"]
    assert browser.js("document.querySelectorAll('.token')[1].textContent") == HOSTILE
    assert browser.js("document.getElementById('prompt').textContent") == HOSTILE
    assert browser.js("document.querySelectorAll('.token')[2].textContent") == "\\u2028"
    assert browser.js("document.querySelectorAll('img').length") == 0


def test_a_young_run_shows_the_charts_that_have_data(browser: Chromium, tmp_path: Path) -> None:
    with RunLog(tmp_path / "young", tensorboard=False) as log:
        log.metrics("pretrain", "train", 1, {"loss": 3.0})
        log.metrics("grpo", "train", 1, {"reward": 0.0, "kl": None, "max_abs_logprob_gap": 0.0})
    browser.open(write_report(tmp_path / "young"))
    assert_no_error(browser)
    assert titles(browser) == {"Stage 1 of 2: pretrain": ["Loss"], "Stage 2 of 2: grpo": ["Reward and its parts", "Logprob gap"]}
    assert browser.js("document.getElementById('viewer').hidden")


@pytest.mark.parametrize("stage", ["pretrain", "grpo"])
def test_a_run_of_one_stage_has_one_section(browser: Chromium, tmp_path: Path, stage: str) -> None:
    with RunLog(tmp_path / "one", tensorboard=False) as log:
        log.metrics(stage, "train", 1, {"loss": 3.0})
        log.metrics(stage, "train", 2, {"loss": 2.0})
    browser.open(write_report(tmp_path / "one"))
    assert_no_error(browser)
    assert titles(browser) == {stage: ["Loss"]}


def test_the_viewer_changes_between_stages_and_a_stage_of_another_kind_draws_all_its_metrics(
        browser: Chromium, tmp_path: Path) -> None:
    with RunLog(tmp_path / "many", tensorboard=False) as log:
        for stage in ("grpo", "student & co", "empty"):
            for step in (1, 2, 3):
                log.metrics(stage, "train", step, {"loss": 1.0 / step, "agreement": 0.5})
                if stage != "empty":
                    log.rollouts(stage, step, [{"group": 0, "text": f"{stage} at {step}"}])
            log.metrics(stage, "eval", 3, {"accuracy": 0.5, "teacher_kl": 0.25})
    path = write_report(tmp_path / "many")
    browser.open(path)
    assert_no_error(browser)
    assert titles(browser) == {
        "Stage 1 of 3: grpo": ["Accuracy", "Loss"],
        "Stage 2 of 3: student & co": ["Accuracy", "Loss", "agreement", "teacher_kl"],
        "Stage 3 of 3: empty": ["Accuracy", "Loss", "agreement", "teacher_kl"]}
    shown = "document.getElementById('tokens').textContent"
    assert browser.js(shown) == "student & co at 3" and browser.js("viewer.closest('.stage').id") == "stage-2"
    browser.js("(s => { s.value = '0'; s.dispatchEvent(new Event('change')); })(document.getElementById('stage-select'))")
    assert browser.js(shown) == "grpo at 3" and browser.js("location.hash").startswith("#stage=grpo&step=3&")
    browser.open(path, "#stage=student%20%26%20co&step=2")
    assert browser.js(shown) == "student & co at 2"
    browser.click("a[href='#stage-3']")
    assert browser.js(shown) == "student & co at 2"
    assert_no_error(browser)
