"""Chat templates: text and tokens equal those of transformers for each family, and a bad template is one
clear error."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from reason_rl.data import Tokenizer
from reason_rl.data.chat import ChatTemplate
from tests.reason_rl.trained import folder_of

USER = [{"role": "user", "content": "Tom has 3 <b>apples</b> & \"2\" more; how many? 数学 {{ 1 }}"}]
SYSTEM = [{"role": "system", "content": " Think first. "}, *USER]
TURNS = [*SYSTEM, {"role": "assistant", "content": "<think>3+2=5</think>\n\n<answer>5</answer>"},
         {"role": "user", "content": "And 1 more?"}]

# Written for these tests in the style of each family: they use the same features as the real ones.
CHATML = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nBe of help.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages if message.role != 'system' %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if tools is not none or documents is not none %}{{- tools | tojson }}{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
THINKING_SWITCH = """
{%- set state = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == 'user' and state.last < 0 %}{%- set state.last = index %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and '</think>' in message.content and loop.index0 < state.last %}
        {%- set said = message.content.split('</think>')[-1].lstrip('\\n') %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}{{- said + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
HEADERS = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system_message + eos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
BRACKETS = """
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate user and assistant') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
ROLES = """{{ eos_token }}{% for message in messages %}
{% if message['role'] == 'assistant' and not loop.last %}
{{ '<|assistant|>
'  + message['content'] + eos_token + '
' }}
{% else %}
{{ '<|' + message['role'] + '|>
' + message['content'] + '
' }}
{% endif %}
    {% if loop.last and add_generation_prompt %}
{{ '<|assistant|>
' }}
    {% endif %}
{% endfor %}
"""
PREFIXED = """[gMASK]<sop>
{%- for message in messages %}
    {%- if loop.index0 > 6 %}{%- break %}{%- endif %}
    {%- if message.content is none %}{%- continue %}{%- endif %}
{{ '<|' ~ message.role ~ '|>' }}
{{ {"text": message.content, "é": [1, "<&>"]} | tojson(indent=2) }}
{%- endfor %}
{%- if add_generation_prompt -%}
<|assistant|>{{- '\\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' -}}
{%- endif -%}
"""
FAMILIES: dict[str, tuple[str, str, list[dict[str, Any]]]] = {
    "qwen2.5": (CHATML, "byte_level", [{}]),
    "qwen3": (THINKING_SWITCH, "byte_level", [{}, {"enable_thinking": True}, {"enable_thinking": False}]),
    "llama3": (HEADERS, "byte_level", [{}, {"date_string": "26 Jul 2024"}]),
    "mixtral": (BRACKETS, "byte_fallback", [{}]),
    "olmoe": (ROLES, "byte_level", [{}]),
    "glm and dots": (PREFIXED, "byte_level", [{}, {"enable_thinking": False}]),
    "unigram": (BRACKETS, "unigram", [{}]),
}
BOS = {"byte_level": "<|begin|>"}


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json", "named"])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_and_tokens_are_those_of_transformers(family: str, where: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source, kind, switches = FAMILIES[family]
    named = [{"name": "tool_use", "template": "wrong"}, {"name": "default", "template": source}]
    values = {} if where == "chat_template.jinja" else {"chat_template": source if where == "tokenizer_config.json" else named}
    folder = folder_of(tmp_path, kind, bos_token=BOS.get(kind, "<s>"), **values)
    if where == "chat_template.jinja":
        (folder / where).write_text(source, encoding="utf-8")
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.chat is not None
    for messages in (USER, SYSTEM, TURNS):
        for variables in switches:
            text = ours.chat.render(messages, datetime.now(), **variables)
            assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)
            ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **variables)
            assert ours.encode(text) == ids  # the template writes the BOS once


def test_a_folder_without_a_template_has_no_chat(tmp_path: Path) -> None:
    assert Tokenizer.load(folder_of(tmp_path)).chat is None


def test_the_day_is_the_given_one() -> None:
    template = ChatTemplate("{{ strftime_now('%d %B %Y') }}", {})
    assert template.render(USER, datetime(2024, 7, 26)) == "26 July 2024"


@pytest.mark.parametrize(("source", "message"), [
    ("{{ raise_exception('Roles must alternate') }}", "TemplateError: Roles must alternate"),
    ("{{ messages[7].content }}", "UndefinedError"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
    ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
     "does not end within 1,000,000 lines"),
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not end within 1,000,000 lines"),
    ("{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "writes more than 1,000,000 characters"),
    ("{{ messages.__class__.__mro__ }}", "SecurityError"), ("{{ messages.append(1) }}", "SecurityError"),
    ("{% set _ = messages[0].update(role='x') %}", "SecurityError"),
    ("{{ ''.__class__ }}{{ cycler.__init__.__globals__ }}", "SecurityError"),
    ("{% include 'x' %}", "no loader"), ("{{ 3 ** 10000000 }}", "SecurityError"),
])
def test_a_template_that_misbehaves_is_one_clear_error(source: str, message: str) -> None:
    before = sys.gettrace()
    with pytest.raises(ValueError, match=message) as caught:
        ChatTemplate(source, {}, "some/folder").render(USER, datetime(2024, 1, 1))
    assert str(caught.value).startswith("the chat template of some/folder fails: ") and sys.gettrace() is before


@pytest.mark.parametrize("source", ["{% for %}", "{{ 'x }}", "{% if a %}", "{% generation %}x"])
def test_invalid_syntax_is_refused_with_its_line(source: str) -> None:
    with pytest.raises(ValueError, match="the chat template of some/folder is not a valid template: line 2"):
        ChatTemplate(f"\n{source}", {}, "some/folder")


def test_a_template_cannot_change_the_messages() -> None:
    messages = json.loads(json.dumps(TURNS))
    ChatTemplate(CHATML, {}).render(messages, datetime(2024, 1, 1))
    assert messages == TURNS
