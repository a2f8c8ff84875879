"""Prompt templates: the text around a problem, the tokens that open it, and the prefix that is graded with
the completion."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from reason_rl.config import Config, ConfigError, TaskConfig
from reason_rl.data import Tokenizer, byte_tokenizer, char_tokenizer, load_problems, load_template
from reason_rl.data.prompts import FOLDER, PromptTemplate
from reason_rl.reward.parts import format_reward
from tests.reason_rl.data.test_chat import BRACKETS, CHATML, HEADERS, THINKING_SWITCH
from tests.reason_rl.trained import folder_of

BYTES = byte_tokenizer()
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.toml"))


def written(path: Path, text: str) -> PromptTemplate:
    (path / "own.toml").write_text(text, encoding="utf-8")
    return load_template(str(path / "own.toml"))


def test_plain_is_the_problem_and_nothing_else() -> None:
    template = load_template("plain")
    assert template.fill("a{b}?\n", BYTES) == "a{b}?\n" and template.completion_prefix == ""
    (problem,) = load_problems(Config(), char_tokenizer()).train(0, 1)
    assert list(problem.prompt_ids) == char_tokenizer().encode(problem.prompt) and problem.completion_prefix == ""


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_template_holds_the_problem_and_asks_for_what_the_format_reward_pays(name: str, tmp_path: Path) -> None:
    template, tokenizer = load_template(name), Tokenizer.load(folder_of(tmp_path, chat_template=CHATML))
    text = template.fill("What is {x} + 1? \\boxed{}", tokenizer)
    assert text.count("What is {x} + 1? \\boxed{}") == 1 and text.endswith(template.completion_prefix)
    if name != "plain":
        shown = text[text.index("<think>", text.find("two:") if "two:" in text else 0):]
        shown = shown[:shown.index("</answer>") + len("</answer>")]
        assert format_reward(shown, "stop") == 1.0
    assert SHIPPED == ["chat", "few_shot", "plain", "r1_zero"]


def test_a_raw_prompt_is_its_texts_put_together_and_opens_as_the_tokenizer_does(tmp_path: Path) -> None:
    template = written(tmp_path, '''
system = "S|"
prompt = "Q: {problem}\\nA: "
completion_prefix = "<think>"
[[examples]]
problem = "1+1"
completion = "<think>2</think><answer>2</answer>\\n"
''')
    tokenizer = Tokenizer.load(folder_of(tmp_path / "with_bos", "byte_fallback"))
    text = template.fill("2+2", tokenizer)
    assert text == "S|Q: 1+1\nA: <think>2</think><answer>2</answer>\nQ: 2+2\nA: <think>"
    (ids,) = template.encode([text], tokenizer)
    assert ids == tokenizer.encode_prompt(text) and ids[0] == tokenizer.id_of("<s>")


def test_a_chat_prompt_is_turns_through_the_checkpoints_template_and_gets_no_second_bos(tmp_path: Path) -> None:
    template = written(tmp_path, '''
use_chat_template = true
system = "Be brief."
prompt = "{problem}!"
day = 2031-05-06
[[examples]]
problem = "1+1"
completion = "2"
''')
    tokenizer = Tokenizer.load(folder_of(tmp_path / "chat", bos_token="<|begin|>", chat_template=HEADERS))
    text = template.fill("2+2", tokenizer)
    head, end = "<|start_header_id|>{}<|end_header_id|>\n\n", "<|im_end|>"
    turns = [("system", "Today Date: 06 May 2031\n\nBe brief."), ("user", "1+1!"), ("assistant", "2"), ("user", "2+2!")]
    assert text == "<|begin|>" + "".join(head.format(role) + said + end for role, said in turns) + head.format("assistant")
    (ids,) = template.encode([text], tokenizer)
    assert ids == tokenizer.encode(text) and ids.count(tokenizer.id_of("<|begin|>")) == 1
    assert load_template("chat").day == date(2024, 7, 26)  # not today
    adding = Tokenizer.load(folder_of(tmp_path / "adding", "byte_fallback", chat_template=BRACKETS))
    (ids,) = load_template("chat").encode([load_template("chat").fill("2+2", adding)], adding)
    assert ids.count(adding.id_of("<s>")) == 1 and adding.encode_prompt("2+2").count(adding.id_of("<s>")) == 1


def test_a_chat_templates_own_switches_are_set_by_name(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder_of(tmp_path / "chat", chat_template=THINKING_SWITCH))
    off = written(tmp_path, 'use_chat_template = true\nprompt = "{problem}"\n[variables]\nenable_thinking = false\n')
    on = written(tmp_path, 'use_chat_template = true\nprompt = "{problem}"\n[variables]\nenable_thinking = true\n')
    assert off.fill("1?", tokenizer) == on.fill("1?", tokenizer) + "<think>\n\n</think>\n\n"


def test_a_prefix_that_the_chat_template_has_written_is_not_written_again(tmp_path: Path) -> None:
    opening = CHATML.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n' }}")
    text = 'use_chat_template = true\nprompt = "{problem}"\ncompletion_prefix = "<think>"\n'
    filled = [written(tmp_path, text).fill("1?", Tokenizer.load(folder_of(tmp_path / name, chat_template=source)))
              for name, source in (("opening", opening), ("plain", CHATML))]
    assert [one.rpartition("assistant")[2] for one in filled] == ["\n<think>\n", "\n<think>"]
    with_break = written(tmp_path, text.replace("<think>", "<think>\\n"))
    assert with_break.fill("1?", Tokenizer.load(tmp_path / "opening")) == filled[0]
    # A problem that ends with the same text keeps it.
    assert written(tmp_path, 'prompt = "{problem}"\ncompletion_prefix = "="').fill("1+1=", BYTES) == "1+1=="


def test_a_thought_that_the_chat_template_opens_is_the_completions(tmp_path: Path) -> None:
    opening = CHATML.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n' }}")
    config = Config(task=TaskConfig(template="chat"))
    for name, source, prefix in (("opening", opening, "<think>"), ("plain", CHATML, "")):
        (problem,) = load_problems(config, Tokenizer.load(folder_of(tmp_path / name, chat_template=source))).train(0, 1)
        assert problem.completion_prefix == prefix and problem.prompt.endswith(f"assistant\n{prefix and '<think>' + chr(10)}")


def test_problems_carry_what_their_prompt_ends_with(tmp_path: Path) -> None:
    config = Config(task=TaskConfig(template="r1_zero"))
    (problem,) = load_problems(config, BYTES).train(0, 1)
    assert problem.completion_prefix == "<think>" and problem.prompt.endswith("Assistant: <think>")
    assert BYTES.decode(problem.prompt_ids) == problem.prompt
    (plain,) = load_problems(Config(), BYTES).train(0, 1)
    assert (plain.problem_id, plain.answer) == (problem.problem_id, problem.answer) and plain.prompt in problem.prompt
    assert problem.task == "program"


@pytest.mark.parametrize(("text", "message"), [
    ('prompt = "no slot"', r"own\.toml: prompt must hold \{problem\} once, got 'no slot'"),
    ('prompt = "{problem}{problem}"', "once, got"), ('system = "x"', "once, got None"),
    ('prompt = "{problem}"\nprefix = "x"', "unknown key 'prefix'; known are prompt, use_chat_template"),
    ('prompt = "{problem}"\nname = "x"', "unknown key 'name'"),
    ('prompt = "{problem}"\nsystem = 3', "system must be str, got 3"),
    ('prompt = "{problem}"\nday = "today"', "day must be date, got 'today'"),
    ('prompt = "{problem}"\nday = 2024-01-01T00:00:00', "day must be date"),
    ('prompt = "{problem}"\n[[examples]]\nproblem = "x"', "an example must have problem and completion, both text"),
    ('prompt = "{problem}"\nexamples = ["x"]', "an example must have problem and completion"),
    ("prompt = ", "is not valid TOML"),
])
def test_an_invalid_template_is_refused_by_its_key(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        written(tmp_path, text)


def test_an_unknown_template_is_refused_with_the_known_ones() -> None:
    for name in ("zero", "nowhere/own.toml"):
        with pytest.raises(ConfigError, match=r"must be one of chat, few_shot, plain, r1_zero, or the path of a \.toml file, got"):
            load_template(name)


def test_a_chat_prompt_needs_a_checkpoint_with_a_chat_template() -> None:
    with pytest.raises(ConfigError, match=r"but the checkpoint has none: no chat_template\.jinja"):
        load_problems(Config(task=TaskConfig(template="chat")), BYTES).train(0, 1)
