"""Chat templates: rendered as in transformers, in a sandbox."""

from __future__ import annotations

import re

import pytest
from ernie_llama._chat.template import ChatTemplate
from ernie_llama.llama_types import ChatCompletionRequestMessage, ChatCompletionTool

USER: ChatCompletionRequestMessage = {"role": "user", "content": "Grüße"}


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>")


def test_blocks_leave_no_blank_lines() -> None:
    source = """{{ bos_token }}
{% for m in messages %}
    {% if true %}
{{ m.role }}: {{ m.content }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
answer:{% endif %}"""
    assert template(source).render([USER, USER]) == "<s>\nuser: Grüße\nuser: Grüße\nanswer:"
    assert template(source).render([USER], add_generation_prompt=False) == "<s>\nuser: Grüße\n"


def test_tools_and_extra_variables_reach_the_template() -> None:
    tool: ChatCompletionTool = {"type": "function", "function": {"name": "f", "description": "<Grüße>"}}
    source = "{% if tools %}{{ tools | tojson }}{% else %}none{% endif %}{{ enable_thinking }}"
    assert template(source).render([USER], tools=[tool], variables={"enable_thinking": False}) == (
        '[{"type": "function", "function": {"name": "f", "description": "<Grüße>", "parameters": {}}}]False'
    )
    assert template(source).render([USER], tools=[]) == "noneFalse"


def test_text_parts_become_one_text_and_other_parts_are_refused() -> None:
    parts: ChatCompletionRequestMessage = {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
    }
    plain = template("{{ messages[0].content + '.' }}")
    assert plain.render([parts]) == "a\nb."
    assert plain.render([USER | {"content": None}]) == "."
    with pytest.raises(ValueError, match="message 0 holds a part of type 'image_url'; this model reads text only"):
        plain.render([{"role": "user", "content": [{"type": "image_url"}]}])


def test_a_template_may_refuse_with_its_own_message() -> None:
    refusing = template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="the chat template refuses these messages: roles must alternate"):
        refusing.render([USER])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_a_template_cannot_escape_its_sandbox(source: str) -> None:
    try:
        rendered = template(source).render([USER])
    except ValueError as error:
        assert "refuses these messages" in str(error)
    else:
        assert rendered == ""


def test_the_date_and_loop_controls_as_in_transformers() -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ strftime_now('%Y-%m-%d') }}{% endfor %}"
    )
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", template(source).render([USER, USER]))


def test_invalid_templates_and_messages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the chat template is not valid Jinja: .*unknown tag 'fr'"):
        template("{% fr %}")
    with pytest.raises(ValueError, match="there are no messages to answer"):
        template("x").render([])
    with pytest.raises(ValueError, match="message 0 has the role None"):
        template("x").render([{"content": "x"}])  # type: ignore[typeddict-item]  # the mistake
