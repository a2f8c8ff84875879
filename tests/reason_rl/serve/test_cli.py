"""The command-line chat with a checkpoint: tokens stream to stdout, bad input is one line on stderr."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from reason_rl.config import ModelConfig
from reason_rl.data import Tokenizer, byte_tokenizer, char_tokenizer
from reason_rl.model.transformer import Transformer
from reason_rl.model.weights import save_weights
from reason_rl.records import SamplingParams
from reason_rl.serve import cli
from tests.reason_rl.trained import folder_of

CONFIG = ModelConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                     num_experts=4, moe_intermediate_size=24, max_position_embeddings=32)
PROMPT = "a2,b*3?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("checkpoint"), char_tokenizer()
    model = Transformer(CONFIG, tokenizer.vocab_size).initialise(0)
    save_weights(folder, model.state_dict(), CONFIG, tokenizer.vocab_size, tokenizer.eos_id)
    tokenizer.save(folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_each_token_is_written_as_it_is_drawn(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    seen: list[str] = []
    real = cli.make_printer

    def watched(*given):
        show = real(*given)

        def watch(token: int) -> None:
            show(token)
            seen.append(capsys.readouterr().out)

        return watch

    monkeypatch.setattr(cli, "make_printer", watched)
    code, _, err = run(capsys, checkpoint, PROMPT, "--max-tokens", 9)
    assert code == 0 and not err and 0 < len(seen) <= 9 and sum(map(bool, seen)) >= len(seen) - 1  # an end token shows nothing


def test_greedy_repeats_itself_and_samples_differ(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    first, second = (run(capsys, checkpoint, PROMPT, "--temperature", 0, "--max-tokens", 12) for _ in range(2))
    assert first == second and first[0] == 0 and first[1].strip()
    _, out, _ = run(capsys, checkpoint, PROMPT, "--samples", 3, "--max-tokens", 12)
    assert len(set(out.splitlines())) >= 3


@pytest.mark.parametrize(("prompt", "words"), [("a2%", "character '%'"), ("a" * 40, "40 tokens"), ("", "is empty")])
def test_a_prompt_that_cannot_be_answered_is_one_line_on_stderr(
    prompt: str, words: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
):
    code, out, err = run(capsys, checkpoint, prompt)
    assert code == 1 and not out and words in err and err.startswith("serve: ") and err.count("\n") == 1


@pytest.mark.parametrize(("option", "words"), [
    ("--samples=0", "--samples must be at least 1, got 0"), ("--max-tokens=0", "max_tokens must be at least 1, got 0"),
    ("--max-tokens=26", "do not fit model.max_position_embeddings = 32"), ("--top-p=2", "top_p must be in (0, 1], got 2.0"),
    ("--temperature=-1", "temperature must be at least 0, got -1.0"), ("--device=tpu", "must be auto, cpu, cuda"),
    ("--template=nowhere", "nowhere"),
])  # fmt: skip
def test_an_option_that_cannot_be_used_is_one_line_on_stderr(
    option: str, words: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
):
    code, out, err = run(capsys, checkpoint, PROMPT, option)
    assert code == 1 and not out and words in err and err.startswith("serve: ") and err.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError, RuntimeError, OSError])
def test_an_error_while_sampling_keeps_its_traceback(error: type[Exception], checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*given: object, **more: object) -> None:
        raise error("a bug")

    monkeypatch.setattr(cli.Engine, "generate", broken)
    with pytest.raises(error, match="a bug"):
        cli.main([str(checkpoint), PROMPT])


@pytest.mark.parametrize("damage", ["nowhere", "model.safetensors", "config.json", "tokenizer.json"])
def test_a_missing_or_damaged_checkpoint_is_one_line_on_stderr(
    damage: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "given"
    if damage != "nowhere":
        shutil.copytree(checkpoint, folder)
        (folder / damage).write_bytes(b"\x00 not it")
    code, out, err = run(capsys, folder, PROMPT)
    assert code == 1 and not out and "given" in err and err.count("\n") == 1


def test_after_a_bad_line_the_next_one_is_answered(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"a%\n{PROMPT}\n"))
    code, out, err = run(capsys, checkpoint, "--max-tokens", 9)
    assert code == 0 and out.strip() and err.count("\n") == 1 and "character '%'" in err


def test_by_default_the_cache_is_not_allocated_for_a_whole_long_context(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    asked: list[int] = []

    def note(engine: object, problems: object, group_size: int, sampling: SamplingParams, **more: object) -> None:
        asked.append(sampling.max_tokens)

    monkeypatch.setattr(cli.Engine, "generate", note)
    assert run(capsys, checkpoint, PROMPT)[0] == 0  # a context of 32, 7 of them the prompt's
    monkeypatch.setattr(cli, "DEFAULT_MAX_TOKENS", 9)
    assert run(capsys, checkpoint, PROMPT)[0] == 0 and run(capsys, checkpoint, PROMPT, "--max-tokens", 20)[0] == 0
    assert asked == [25, 9, 20]


def test_ctrl_c_leaves_quietly(checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "answer", interrupted)
    code, out, err = run(capsys, checkpoint, PROMPT)
    assert code == 130 and not out.strip() and not err


def test_a_template_makes_the_prompt_and_its_prefix_is_shown(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "own.toml").write_text('prompt = "{problem}?"\ncompletion_prefix = "<think>"\n')
    seen: list[str] = []
    real = cli.Engine.generate

    def watched(self, problems, *given, **more):
        seen.extend(char_tokenizer().decode(problem.prompt_ids) for problem in problems)
        return real(self, problems, *given, **more)

    monkeypatch.setattr(cli.Engine, "generate", watched)
    code, out, err = run(capsys, checkpoint, "a2,b*3", "--max-tokens", 5, "--template", tmp_path / "own.toml")
    assert code == 0 and not err and seen == ["a2,b*3?<think>"] and out.startswith("<think>")
    code, out, err = run(capsys, checkpoint, "a2", "--template", "chat")
    assert code == 1 and "no chat_template.jinja" in err and err.count("\n") == 1


def shown(tokenizer: Tokenizer, text: str) -> list[str]:
    """The output of each token with its colours: <think> dim (2), <answer> bold green (1;32)."""
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    show, said = cli.make_printer(tokenizer, console), []
    for token in [*(t for piece in text for t in tokenizer.encode(piece)), *tokenizer.stop_ids[-1:]]:
        before = len(console.file.getvalue())  # type: ignore[attr-defined]
        show(token)
        said.append(console.file.getvalue()[before:])  # type: ignore[attr-defined]
    return said


def test_characters_are_shown_whole_and_end_tokens_not_at_all(tmp_path: Path):
    assert shown(byte_tokenizer(), "a数b") == ["a", "", "", "数", "b", ""]
    pieces = Tokenizer.load(folder_of(tmp_path, generation={"eos_token_id": [2, 3]}))
    assert pieces.stop_ids == (2, 3) and shown(pieces, "ab") == ["a", "b", ""]


def test_thought_and_answer_are_styled_even_if_tags_are_several_tokens(tmp_path: Path):
    pieces = Tokenizer.load(folder_of(tmp_path))
    assert not pieces.has_token("<think>")
    said = shown(pieces, "a<think>b</think>c<answer>d</answer>e")
    assert said[0] == "a" and said[-2] == "e"
    assert "\x1b[2mb\x1b[0m" in said and "c" in said and "\x1b[1;32md\x1b[0m" in said
