"""The page of one step: its numbers are those of the stage's own step, and they agree with sums made by hand."""

from __future__ import annotations

import hashlib
import html
import re
from itertools import product
from pathlib import Path

import pytest
import torch

from kernels.attention import BLOCK_SIZE
from kernels.group_advantage import group_advantage
from kernels.grpo_loss import LossInputs, LossSpec, grpo_loss, make_inputs
from reason_rl.explain.__main__ import main
from reason_rl.explain.by_hand import advantage, terms_of
from reason_rl.explain.page import FULL_SURPRISE, regions, visible
from reason_rl.explain.step import explain, prepare
from reason_rl.records import StepStats
from reason_rl.stages.base import StageStart
from reason_rl.stages.grpo import Grpo
from tests.reason_rl.report.chromium import Chromium, find_chromium
from tests.reason_rl.run.tiny_run import never_stop, run_here
from tests.reason_rl.tiny import make_engine, problem, sampling, tiny_model

SIZES = ["--rl.prompts_per_step=2", "--rl.group_size=4", "--run.seed=3"]
OPTIONS = ["--prompts=2", "--group=4", "--seed=3"]
SMALL_MICROBATCHES = "--optim.microbatch_tokens=40"
"""So that an update has several microbatches, and a prompt is packed twice."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        never_stop(monkeypatch)
        out_dir = tmp_path_factory.mktemp("run")
        assert run_here(out_dir, "--rl.steps=1", "--pretrain.steps=60", "--eval.final_problems=2", "--eval.pass_at_k=0",
                        "--task.min_level=1", "--task.max_level=2") == 0
    return out_dir / "tiny" / "checkpoints" / "final"


@pytest.fixture(scope="module")
def page(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "explain.html"
    assert main([str(checkpoint), *OPTIONS, f"--out={out}", SMALL_MICROBATCHES]) == 0
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def stats(checkpoint: Path) -> StepStats:
    """The same step by the stage itself, without observers."""
    observed = prepare(checkpoint, None, [*SIZES, SMALL_MICROBATCHES])
    stage = Grpo(StageStart(observed.config, observed.world, observed.tokenizer, observed.problems, 0, checkpoint, None))
    try:
        return stage.step(0)
    finally:
        stage.close()


def marked(page: str, name: str) -> list[float]:
    return [float(text) for text in re.findall(rf'data-{name}="[^"]*">([^<]*)<', page)]


def terms_by_update(page: str) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for number, table in re.findall(r'<table class="loss-tokens" data-update="(\d+)">(.*?)</table>', page, re.DOTALL):
        found.setdefault(int(number), []).extend(float(text) for text in re.findall(r'class="num term">([^<]*)<', table))
    return found


def assert_sums_agree(page: str) -> None:
    kernel, by_hand, terms = marked(page, "kernel"), marked(page, "by-hand"), terms_by_update(page)
    assert len(kernel) == len(by_hand) == len(terms) > 0
    for number, values in terms.items():
        assert sum(values) == pytest.approx(by_hand[number - 1], rel=1e-7)  # nine digits of each term are on the page
        assert by_hand[number - 1] == pytest.approx(kernel[number - 1], rel=1e-6)


def test_the_terms_on_the_page_add_up_to_the_kernels_loss(page: str):
    assert_sums_agree(page)


def test_one_wrong_term_is_noticed(page: str):
    term = max(re.findall(r'class="num term">([^<]*)<', page), key=lambda text: abs(float(text)))
    with pytest.raises(AssertionError):
        assert_sums_agree(page.replace(f'class="num term">{term}<', f'class="num term">{float(term) * 1.01}<', 1))


def test_the_numbers_are_those_of_the_stages_own_step(page: str, stats: StepStats):
    assert marked(page, "advantage") == pytest.approx([value for group in stats.advantages for value in group], rel=1e-5, abs=1e-9)
    counts = [len(values) for values in terms_by_update(page).values()]
    loss = sum(value * count for value, count in zip(marked(page, "kernel"), counts, strict=True)) / sum(counts)
    assert sum(counts) == stats.metrics["num_loss_tokens"] and len(counts) == 2
    assert loss == pytest.approx(stats.metrics["loss"], rel=1e-7)
    assert max(marked(page, "grad-norm")) == pytest.approx(stats.metrics["grad_norm"], rel=1e-8)


def test_every_sampled_token_is_on_the_page_with_its_logprob(page: str, stats: StepStats, checkpoint: Path):
    tokenizer = prepare(checkpoint, None, SIZES).tokenizer
    shown = re.findall(r'title="id (\d+) · logprob ([^"]*)">([^<]*)</span>', page)
    completions = [completion for group in stats.groups for completion in group.completions]
    assert [int(number) for number, _, _ in shown] == [token for one in completions for token in one.token_ids]
    logprobs = [value for one in completions for value in one.logprobs]
    assert [float(value) for _, value, _ in shown] == pytest.approx(logprobs, rel=1e-5)  # six digits are on the page
    pieces = [visible(piece) for one in completions for piece in tokenizer.pieces(one.token_ids)]
    assert [html.unescape(text) for *_, text in shown] == pieces


def test_the_page_asks_for_nothing(page: str):
    assert "<script" not in page and not re.search(r"https?:|src=|url\(|@import", page)


def test_the_run_is_left_as_it_was(checkpoint: Path, tmp_path: Path):
    def digest() -> dict[str, str]:
        files = [path for path in checkpoint.parents[2].rglob("*") if path.is_file()]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = digest()
    assert main([str(checkpoint), *OPTIONS, f"--out={tmp_path / 'e.html'}"]) == 0
    assert digest() == before and [path.name for path in tmp_path.iterdir()] == ["e.html"]


def test_blocks_of_a_prompt_are_shared_and_every_token_has_room(checkpoint: Path):
    stage = explain(checkpoint, prepare(checkpoint, None, SIZES)).stage
    assert max(ref_count for moment in stage.moments for *_, ref_count in moment.prompts) == 4
    for moment in stage.moments:
        own = [block for *_, blocks, _ in moment.sequences for block in blocks]
        shared = [block for _, blocks, _ in moment.prompts for block in blocks]
        assert len(set(own + shared)) == len(own + shared) and 0 not in own + shared
        assert sum(ref_count for *_, ref_count in moment.prompts) == len(moment.sequences)
        assert all(len(blocks) * BLOCK_SIZE >= count for *_, blocks, count in moment.sequences)


@pytest.mark.parametrize("decoder", ["auto", "ops"])
def test_an_observed_engine_samples_the_same_tokens(decoder: str):
    problems, seen = [problem(number, 5 + 20 * number) for number in range(3)], []
    plain, observed = (make_engine(tiny_model(), decoder=decoder, num_blocks=12) for _ in range(2))
    observed.on_step = lambda scheduler: seen.append(len(scheduler.running))
    assert plain.generate(problems, 3, sampling(), step=0) == observed.generate(problems, 3, sampling(), step=0)
    assert max(seen) > 1


SPECS = [LossSpec(surrogate=surrogate, ratio=ratio, normalizer=normalizer, constant_length=9, importance=importance, dual_clip=dual,
                  kl_coef=kl, kl_estimator=estimator, entropy_coef=kl / 3)
         for (surrogate, dual), (ratio, normalizer), importance, (kl, estimator) in product(
             (("clip", 0.0), ("clip", 1.3), ("cispo", 0.0), ("reinforce", 0.0)),
             (("token", "token"), ("sequence", "sequence"), ("token", "constant")), ("none", "tis", "icepop"),
             ((0.0, "k3"), (0.1, "k1"), (0.1, "k2"), (0.1, "k3")))]


def test_the_terms_by_hand_are_those_of_every_algorithm():
    case = make_inputs(dtype=torch.float64)["uneven"]
    logprobs, entropy = case.pop("logprobs"), case.pop("entropy")
    inputs = LossInputs(**case)
    for spec in SPECS:
        loss, metrics = grpo_loss(logprobs, inputs, spec, entropy, impl="reference")
        terms = terms_of(logprobs, inputs, spec, entropy)
        assert float(terms.value.sum()) == pytest.approx(float(loss), rel=1e-12), spec
        for clip in ("low", "high", "dual"):
            if clip == "dual" or not spec.dual_clip:  # a token that two clips change counts once by hand
                assert terms.clips.count(clip) == float(metrics[f"clip_{clip}_sum"]), spec


@pytest.mark.parametrize("kind", ["std", "mean", "leave_one_out", "batch_std"])
def test_the_formula_of_an_advantage_gives_the_ops_value(kind: str):
    rewards = torch.tensor([[0.0, 1.1, 0.1, 1.0], [0.5, 0.25, 0.0, 1.0]], dtype=torch.float64)
    expected = group_advantage(rewards, kind=kind)[0].flatten().tolist()  # type: ignore[arg-type]
    batch = rewards.flatten().tolist()
    found = [advantage(value, group, batch, kind) for group in rewards.tolist() for value in group]
    assert [value for _, value in found] == pytest.approx(expected, rel=1e-12)
    written = [eval(words.replace("−", "-")) for words, _ in found]  # the formula itself, to the six digits that are shown
    assert written == pytest.approx(expected, rel=1e-4)


def test_thought_and_answer_are_marked():
    pieces = ["a", "</think>", "<ans", "wer>", "4", "</answer>", "<eos>"]
    assert regions(pieces, "<think>") == ["think", "markup", "markup", "markup", "answer", "markup", ""]
    assert regions(["x", "<think>", "y"], "") == ["", "markup", "think"]
    assert FULL_SURPRISE > 0 and visible("\n") == "↵"


def test_a_step_without_signal_says_so(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    equal = ["--reward.custom=", "--reward.accuracy=0", "--reward.format=0", "--reward.overlong=0"]
    assert main([str(checkpoint), *OPTIONS, f"--out={tmp_path / 'e.html'}", *equal]) == 0
    text = (tmp_path / "e.html").read_text()
    assert "No update" in text and "no signal" in text and "loss-tokens\"" not in text
    assert "no update" in capsys.readouterr().out


def test_problems_that_dynamic_sampling_replaced_are_left_out(checkpoint: Path, tmp_path: Path):
    """Few groups have a right completion here, so that some are replaced."""
    more = ["--rl.dynamic_sampling=3", "--reward.custom=", "--task.min_level=3", "--task.max_level=3"]
    stage = explain(checkpoint, prepare(checkpoint, None, [*SIZES, *more])).stage
    assert len({problem.problem_id for moment in stage.moments for problem, *_ in moment.prompts}) > 2
    assert main([str(checkpoint), *OPTIONS, f"--out={tmp_path / 'e.html'}", *more]) == 0
    page = (tmp_path / "e.html").read_text()
    assert set(re.findall(r'class="owner g\d">(P\d+)<', page)) == {"P1", "P2"}


@pytest.mark.parametrize(("more", "reason"), [
    (["--group=1"], "group_size"), (["--prompts=0"], "prompts_per_step"), (["--max-tokens=4000"], "max_position_embeddings"),
    (["--rl.stepz=3"], "stepz"), (["--out=/no/such/folder/e.html"], "--out"), (["--config=none.toml"], "none.toml")])
def test_bad_options_are_refused_in_one_line(
        checkpoint: Path, tmp_path: Path, more: list[str], reason: str, capsys: pytest.CaptureFixture[str]):
    assert main([str(checkpoint), f"--out={tmp_path / 'e.html'}", *more]) == 1
    error = capsys.readouterr().err
    assert error.startswith("explain: ") and error.count("\n") == 1 and reason in error and not list(tmp_path.iterdir())


def test_a_folder_that_is_no_checkpoint_of_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path)]) == 1
    assert "--config" in capsys.readouterr().err
    assert main([str(tmp_path), "--task.name=program"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.browser
@pytest.mark.skipif(find_chromium() is None, reason="needs Chromium")
def test_the_page_fits_a_phone_and_requests_nothing(page: str, tmp_path: Path):
    path = tmp_path / "e.html"
    path.write_text(page, encoding="utf-8")
    with Chromium(tmp_path / "profile") as browser:
        for width in (320, 1280):
            browser.open(path, width=width, scheme="dark")
            assert browser.js("document.documentElement.scrollWidth") <= width
            requests = [event["params"]["request"]["url"] for event in browser.events
                        if event["method"] == "Network.requestWillBeSent"]
            assert {url for url in requests if not url.startswith(("data:", "about:"))} == {path.resolve().as_uri()}
