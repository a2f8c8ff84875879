"""report.html as a file, and the picture of several runs: structure, hostile text, missing parts, clear errors."""

from __future__ import annotations

import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bench import plot
from reason_rl.report import page as report
from reason_rl.report.log import RunLog, read_jsonl
from reason_rl.report.page import columns, read_rollouts, report_context, write_report
from tests.reason_rl.report.fake_run import CAUSE, HOSTILE, STEPS, write_fake_run


class Page(HTMLParser):
    """Tags with attributes, text by the element it stands in, and the embedded data."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.text += data

    def data(self) -> Any:
        return json.loads(next(script for script in self.scripts if script.startswith("{")))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_run(tmp_path_factory.mktemp("runs") / "program")


def test_the_page_holds_header_curves_and_rollouts_of_the_run(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    text = " ".join(page.text.split())
    for words in ("program", "90 RL steps · seed 0", "96.0%", "3m35s", "1.9e-06", "6.9× the base",
                  "What it does not", "Drawn 16 times", "[rl] steps = 90"):
        assert words in text, words
    data = page.data()
    assert data["rl"]["step"] == list(range(1, STEPS + 1))
    assert data["eval"]["accuracy"][0] < 0.25 < 0.9 < data["eval"]["accuracy"][-1]
    assert [step["step"] for step in data["rollouts"]] == [1, *range(10, 91, 10)]
    sample = data["rollouts"][0]["groups"][0]["samples"][0]
    assert len(sample["tokens"]) == len(sample["logprobs"]) and sample["cause"] == ""
    assert len(data["rl"]["approx_kl"]) == len(data["timings"]["rl"]["train_tok_s"]) == STEPS


def test_an_ungraded_completion_carries_its_cause(run: Path) -> None:
    page = Page(write_report(run).read_text(encoding="utf-8"))
    ungraded = page.data()["rollouts"][0]["groups"][0]["samples"][7]
    assert not ungraded["is_graded"] and ungraded["cause"] == CAUSE
    assert "<b>here" not in (run / "report.html").read_text(encoding="utf-8")  # escaped: its markup stays text


def test_the_page_asks_the_network_for_nothing(run: Path) -> None:
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "data:").startswith(("data:", "#")), tag
    outside = set(re.findall(r"https?://[^\s'\"]+", html)) - {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert not outside


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "a<b>&'\"", hostile=True)
    html = write_report(folder).read_text(encoding="utf-8")
    page = Page(html)
    own_scripts = 4  # the error catcher, the data, the charts, the viewer
    assert len(page.scripts) == own_scripts and html.lower().count("</script") == own_scripts
    assert "alert(1)" not in "".join(script for script in page.scripts if not script.startswith("{"))
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in page.tags)
    assert HOSTILE in page.text  # the config, shown as it is
    group = page.data()["rollouts"][0]["groups"][0]
    assert group["prompt"] == HOSTILE and group["samples"][0]["tokens"][1] == HOSTILE
    assert "{{ 7 * 7 }}" in html  # text of a run is never a template


@pytest.mark.parametrize("missing", ["summary.json", "config.toml", "timings.jsonl", "rollouts"])
def test_a_missing_part_leaves_the_rest_standing(tmp_path: Path, missing: str) -> None:
    folder = write_fake_run(tmp_path / "program")
    if missing == "rollouts":
        for path in (folder / missing).iterdir():
            path.unlink()
        (folder / missing).rmdir()
    else:
        (folder / missing).unlink()
    text = " ".join(Page(write_report(folder).read_text(encoding="utf-8")).text.split())
    assert "96.0%" in text and ("unfinished" in text) == (missing == "summary.json")


def test_a_run_that_has_only_pretrained_has_a_report(tmp_path: Path) -> None:
    with RunLog(tmp_path / "young", tensorboard=False) as log:
        log.metrics("pretrain", 0, {"loss": 3.0, "lr": float("nan")})
    page = Page(write_report(tmp_path / "young").read_text(encoding="utf-8"))
    assert "no RL step yet" in page.text and page.data()["pretrain"]["loss"] == [3.0]


def test_a_completion_without_tokens_or_with_a_wrong_number_of_logprobs_is_still_shown(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.metrics("rl", 1, {"reward": 0.0})
        log.rollouts(1, [{"group": 0, "text": "only text"}, {"group": 0, "tokens": ["a", "b"], "logprobs": [-1.0]}])
    samples = Page(write_report(tmp_path).read_text(encoding="utf-8")).data()["rollouts"][0]["groups"][0]["samples"]
    assert samples[0]["tokens"] == ["only text"] and samples[0]["logprobs"] == []
    assert samples[1]["tokens"] == ["a", "b"] and samples[1]["logprobs"] == []


def test_an_empty_or_absent_run_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run folder at .*nowhere"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"nothing to report: .*metrics\.jsonl is missing or empty"):
        write_report(tmp_path)
    with pytest.raises(SystemExit, match="error: nothing to report"):
        report.main([str(tmp_path)])
    assert not (tmp_path / "report.html").exists()


def test_a_damaged_summary_is_named(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "program")
    (folder / "summary.json").write_text('{"seed": ')
    with pytest.raises(ValueError, match=r"summary\.json is not valid JSON"):
        write_report(folder)


def test_too_many_rollouts_lose_their_later_groups_evenly_and_the_page_says_so(
        run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything, none_left_out = read_rollouts(run)
    some, num_left_out = read_rollouts(run, max_tokens=6000)
    num_samples = sum(len(group["samples"]) for step in everything for group in step["groups"])
    kept = sum(len(group["samples"]) for step in some for group in step["groups"])
    assert none_left_out == 0 and 0 < num_left_out == num_samples - kept
    assert len(some) == len(everything) and {len(step["groups"]) for step in some} <= {1, 2, 3}
    monkeypatch.setattr(report, "read_rollouts", lambda folder: (some, num_left_out))
    assert f"{num_left_out} completions are left out" in Page(write_report(run).read_text(encoding="utf-8")).text


def test_long_curves_are_thinned_with_both_ends_kept() -> None:
    table = columns([{"phase": "pretrain", "step": step, "loss": 1.0 / (step + 1)} for step in range(5000)])
    assert len(table["step"]) == report.MAX_POINTS and table["step"][0] == 0 and table["step"][-1] == 4999
    assert "phase" not in table
    assert columns([{"step": 1, "a": 2.0}, {"step": 2}]) == {"step": [1, 2], "a": [2.0, None]}


def test_facts_come_from_the_evaluations_where_there_is_no_summary(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "program")
    with_summary = report_context(folder)["facts"]
    (folder / "summary.json").unlink()
    without = report_context(folder)["facts"]
    for key in ("base_accuracy", "final_accuracy", "base_thinks_share", "final_mean_thinking_tokens"):
        assert without[key] == with_summary[key]
    gaps = [row["max_abs_logprob_gap"] for row in read_jsonl(folder / "metrics.jsonl") if row["phase"] == "rl"]
    assert without["max_abs_logprob_gap"] == max(gaps)


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])  # type: ignore[return-value]


def test_the_picture_draws_every_run_and_a_third_panel_only_for_pass_at_k(run: Path, tmp_path: Path) -> None:
    other = write_fake_run(tmp_path / "program-1", seed=1)
    plot.main([str(tmp_path / "out" / "both.png"), str(run), str(other)])
    with RunLog(tmp_path / "bare", tensorboard=False) as log:
        for step in (0, 10):
            log.metrics("eval", step, {"accuracy": 0.1 * step, "mean_thinking_tokens": 3.0})
    plot.plot_runs([tmp_path / "bare"], tmp_path / "bare.png")
    three, two = png_size(tmp_path / "out" / "both.png"), png_size(tmp_path / "bare.png")
    assert three[0] * 2 == pytest.approx(two[0] * 3, rel=0.01) and three[1] == two[1]  # whole pixels


def test_runs_without_an_evaluation_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no evaluation"):
        plot.plot_runs([tmp_path], tmp_path / "x.png")
    with pytest.raises(ValueError, match="at least one run"):
        plot.plot_runs([], tmp_path / "x.png")
