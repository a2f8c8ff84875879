"""report.html as a file, and the plot of runs: structure, hostile text, missing files, clear errors."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bench import plot
from reason_rl.report import page as report
from reason_rl.report.log import RunLog, read_log
from reason_rl.report.page import columns, read_rollouts, report_context, stage_kinds, write_report
from tests.reason_rl.report.fake_run import CAUSE, HOSTILE, STEPS, write_fake_run


class Page(HTMLParser):
    """The page's tags with attributes, its visible text, its scripts and the embedded data."""

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


def words_of(folder: Path) -> str:
    return " ".join(Page(write_report(folder).read_text(encoding="utf-8")).text.split())


def test_the_page_holds_header_curves_and_rollouts_of_the_run(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    text = " ".join(page.text.split())
    for words in ("program", "pretrain → grpo · seed 0", "96.0%", "3m35s", "1.9e-06", "6.9× the base",
                  "What this does not show", "In 16 samples", "[stage.rl] steps = 90"):
        assert words in text, words
    data = page.data()
    pretrain, grpo = data["stages"]
    assert (pretrain["name"], pretrain["kind"], grpo["name"], grpo["kind"]) == ("pretrain", "pretrain", "grpo", "grpo")
    assert grpo["train"]["step"] == list(range(1, STEPS + 1)) and len(pretrain["train"]["loss"]) == 201
    assert grpo["eval"]["accuracy"][0] < 0.25 < 0.9 < grpo["eval"]["accuracy"][-1]
    (rollouts,) = data["rollouts"]
    assert rollouts["stage"] == "grpo" and [step["step"] for step in rollouts["steps"]] == [1, *range(10, 91, 10)]
    sample = rollouts["steps"][0]["groups"][0]["samples"][0]
    assert len(sample["tokens"]) == len(sample["logprobs"]) and sample["cause"] == ""
    assert len(grpo["train"]["approx_kl"]) == len(grpo["timings"]["train"]["train_tok_s"]) == STEPS


def test_an_ungraded_completion_carries_its_cause(run: Path) -> None:
    page = Page(write_report(run).read_text(encoding="utf-8"))
    ungraded = page.data()["rollouts"][0]["steps"][0]["groups"][0]["samples"][7]
    assert not ungraded["is_graded"] and ungraded["cause"] == CAUSE
    # Its markup is escaped.
    assert "<b>here" not in (run / "report.html").read_text(encoding="utf-8")


def test_the_page_asks_the_network_for_nothing(run: Path) -> None:
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "data:").startswith(("data:", "#")), tag
    # The SVG namespace is a name: no browser fetches it.
    outside = set(re.findall(r"https?://[^\s'\"]+", html)) - {"http://www.w3.org/2000/svg"}
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
    group = page.data()["rollouts"][0]["steps"][0]["groups"][0]
    assert group["prompt"] == HOSTILE and group["samples"][0]["tokens"][1] == HOSTILE
    assert "{{ 7 * 7 }}" in html  # text of a run is never a template


@pytest.mark.parametrize("missing", ["summary.json", "config.toml", "timings.jsonl", "rollouts"])
def test_the_page_is_written_without_a_missing_file(tmp_path: Path, missing: str) -> None:
    folder = write_fake_run(tmp_path / "program")
    if missing == "rollouts":
        shutil.rmtree(folder / missing)
    else:
        (folder / missing).unlink()
    text = words_of(folder)
    assert "96.0%" in text and ("unfinished" in text) == (missing == "summary.json")


def test_a_run_that_has_only_pretrained_has_a_page(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "young")
    with RunLog(folder, tensorboard=False) as log:
        log.restore("grpo", {})
        log.restore("pretrain", log.history("pretrain"))
    (folder / "summary.json").unlink()
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    words = " ".join(page.text.split())
    assert "pretrain → grpo · seed" not in words and "2grponot begun" in words and "2000 steps" in words
    (stage,) = page.data()["stages"]
    assert stage["name"] == "pretrain" and stage["train"]["lr"][0] == 2e-3 and page.data()["rollouts"] == []
    assert "What this shows" not in words  # there is no accuracy yet, and no RL


def test_a_run_of_grpo_alone_has_a_page(tmp_path: Path) -> None:
    with RunLog(tmp_path / "tuned", tensorboard=False) as log:
        log.metrics("grpo", "eval", 0, {"accuracy": 0.25})
        log.metrics("grpo", "train", 1, {"reward": 0.5, "lr": float("nan")})
        log.metrics("grpo", "eval", 1, {"accuracy": 0.5})
    page = Page(write_report(tmp_path / "tuned").read_text(encoding="utf-8"))
    assert "Held-out accuracy went from 25.0% to 50.0%" in " ".join(page.text.split())
    assert "lr" not in page.data()["stages"][0]["train"]  # it was never a number


def test_each_stage_has_its_card_its_curves_and_its_rollouts(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        for number, stage in enumerate(("zero", "cold start", "final"), start=1):
            log.metrics(stage, "train", 1, {"loss": 2.0, "extra": 0.5 * number})
            log.metrics(stage, "train", 2, {"loss": 1.0 / number, "extra": 0.25})
            log.metrics(stage, "eval", 2, {"accuracy": 0.2 * number})
            if stage != "cold start":
                log.rollouts(stage, 2, [{"group": 0, "text": stage}])
    (tmp_path / "config.toml").write_text(
        '[[stage]]\nname = "zero"\nkind = "grpo"\n[[stage]]\nname = "cold start"\nkind = "sft"\n'
        '[[stage]]\nname = "final"\nkind = "grpo"\n[[stage]]\nkind = "distill"\n', encoding="utf-8")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    words = " ".join(page.text.split())
    assert "zero → cold start → final → distill" in words and "No supervised step" not in words
    assert "held-out accuracy 40.0%" in words and "loss 2.000 → 0.333" in words and "4distillnot begun" in words
    data = page.data()
    assert data["num_stages"] == 4
    assert [(stage["name"], stage["kind"], stage["train"]["extra"]) for stage in data["stages"]] == [
        ("zero", "grpo", [0.5, 0.25]), ("cold start", "sft", [1.0, 0.25]), ("final", "grpo", [1.5, 0.25])]
    assert [(one["stage"], len(one["steps"])) for one in data["rollouts"]] == [("zero", 1), ("final", 1)]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == ["#stage-1", "#stage-2", "#stage-3"]


@pytest.mark.parametrize(("config", "kinds"), [
    ("", {}), ("not = = toml", {}), ('stage = "grpo"', {}), ("[[stage]]\nname = 'x'\n", {}),
    ("[[stage]]\nkind = 'grpo'\n[[stage]]\nname = 'b'\nkind = 'grpo'\n", {"grpo": "grpo", "b": "grpo"}),
])
def test_kinds_of_stages_come_from_the_config_if_it_has_them(config: str, kinds: dict[str, str]) -> None:
    assert stage_kinds(config) == kinds


def test_a_completion_without_tokens_or_with_a_wrong_number_of_logprobs_is_still_shown(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.metrics("grpo", "train", 1, {"reward": 0.0})
        log.rollouts("grpo", 1, [{"group": 0, "text": "only text"}, {"group": 0, "tokens": ["a", "b"], "logprobs": [-1.0]}])
    data = Page(write_report(tmp_path).read_text(encoding="utf-8")).data()
    samples = data["rollouts"][0]["steps"][0]["groups"][0]["samples"]
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


def test_past_the_token_limit_every_step_loses_its_later_groups_and_the_page_counts_them(
        run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (everything,), none_left_out = read_rollouts(run, ["pretrain", "grpo"])
    (some,), num_left_out = read_rollouts(run, ["pretrain", "grpo"], max_tokens=6000)
    num_samples, num_kept = [sum(len(group["samples"]) for step in stage["steps"] for group in step["groups"])
                             for stage in (everything, some)]
    assert none_left_out == 0 and 0 < num_left_out == num_samples - num_kept
    assert len(some["steps"]) == len(everything["steps"])
    assert {len(step["groups"]) for step in some["steps"]} <= {1, 2, 3}
    monkeypatch.setattr(report, "read_rollouts", lambda folder, stages: ([some], num_left_out))
    assert f"{num_left_out} completions are left out" in words_of(run)


def test_long_curves_are_thinned_and_keep_both_ends() -> None:
    table = columns([{"phase": "train", "step": step, "loss": 1.0 / (step + 1)} for step in range(5000)])
    assert len(table["step"]) == report.MAX_POINTS and table["step"][0] == 0 and table["step"][-1] == 4999
    assert "phase" not in table
    assert columns([{"step": 1, "a": 2.0}, {"step": 2}]) == {"step": [1, 2], "a": [2.0, None]}


def test_without_a_summary_facts_come_from_the_evaluations(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "program")
    with_summary = report_context(folder)["facts"]
    (folder / "summary.json").unlink()
    without = report_context(folder)["facts"]
    for key in ("base_accuracy", "final_accuracy", "base_thinks_share", "final_mean_thinking_tokens"):
        assert without[key] == with_summary[key]
    gaps = [line["max_abs_logprob_gap"] for line in read_log(folder, "metrics.jsonl", stage="grpo", phase="train")]
    assert without["max_abs_logprob_gap"] == max(gaps)


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])  # type: ignore[return-value]


def test_the_plot_draws_every_run_and_a_third_panel_only_for_pass_at_k(run: Path, tmp_path: Path) -> None:
    other = write_fake_run(tmp_path / "program-1", seed=1)
    plot.main([str(tmp_path / "out" / "both.png"), str(run), str(other)])
    with RunLog(tmp_path / "bare", tensorboard=False) as log:
        for step in (0, 10):
            log.metrics("grpo", "eval", step, {"accuracy": 0.1 * step, "mean_thinking_tokens": 3.0})
    plot.plot_runs([tmp_path / "bare"], tmp_path / "bare.png")
    three, two = png_size(tmp_path / "out" / "both.png"), png_size(tmp_path / "bare.png")
    assert three[0] * 2 == pytest.approx(two[0] * 3, rel=0.01) and three[1] == two[1]  # whole pixels


def test_runs_without_an_evaluation_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no evaluation"):
        plot.plot_runs([tmp_path], tmp_path / "x.png")
    with pytest.raises(ValueError, match="at least one run"):
        plot.plot_runs([], tmp_path / "x.png")


def test_the_plot_takes_the_last_stage_with_evaluations_unless_one_is_named(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        for number, stage in enumerate(("grpo", "grpo-2")):
            log.metrics(stage, "eval", 0, {"accuracy": 0.1 * number})
        log.metrics("prm", "train", 1, {"loss": 1.0})
    assert [line["stage"] for line in plot.stage_evaluations(tmp_path)] == ["grpo-2"]
    assert [line["accuracy"] for line in plot.stage_evaluations(tmp_path, "grpo")] == [0.0]
    with pytest.raises(ValueError, match="holds no evaluation of stage 'prm'"):
        plot.stage_evaluations(tmp_path, "prm")


def test_the_page_needs_no_matplotlib() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; import reason_rl.report.page"
    subprocess.run([sys.executable, "-c", code], check=True)
