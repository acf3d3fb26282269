# ruff: noqa: E501  # templates are long lines
"""Chat templates in the styles that checkpoints have, and messages to try them on."""

from __future__ import annotations

from typing import Any

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}
"""

DEFAULT_SYSTEM = """\
{%- if messages[0]['role'] == 'system' -%}
    {%- set system_message = messages[0]['content'] -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set system_message = 'You are helpful.' -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{{- '<|im_start|>system\\n' + system_message + '<|im_end|>\\n' -}}
{%- for message in loop_messages -%}
    {%- if loop.first and message.role != 'user' %}{{ raise_exception('first must be user') }}{% endif -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif -%}
"""

HEADERS = """\
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2026" %}{%- endif %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "You have access to the following functions:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}{{- eos_token }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + eos_token }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("one tool call at a time") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}" }}{{- eos_token }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

INST = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if message.role in ["user", "assistant"] %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""

REASONING = """\
{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == "user" and message.content is string %}
        {%- set ns.found = true %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and reasoning %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

TOOLS = """\
{%- if tools %}
    {{- '<tools>\\n' }}
    {%- for tool in tools %}
        {%- set f = tool.function if tool.function is defined else tool %}
        {{- f.name ~ '(' }}
        {%- for name, spec in f.parameters.properties.items() %}
            {{- name ~ ': ' ~ spec.type }}{{ ', ' if not loop.last }}
        {%- endfor %}
        {{- ') ' ~ tool | tojson ~ '\\n' }}
    {%- endfor %}
    {{- '</tools>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.tool_calls %}
        {%- for call in m.tool_calls %}
            {{- '<call>' ~ call.function.name ~ ' ' ~ (call.function.arguments | tojson(sort_keys=true)) ~ '</call>' }}
        {%- endfor %}
    {%- endif %}
    {{- m.role ~ ': ' ~ (m.content if m.content is defined else 'nothing') ~ '\\n' }}
{%- endfor %}
"""

MACROS = """\
{%- macro say(role, content, last=false) -%}
    {%- if content is string -%}<{{ role }}>{{ content }}</{{ role }}>
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'text' -%}<{{ role }}>{{ part.text }}</{{ role }}>
            {%- else -%}<{{ part.type }}/>{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '!' if last }}
{%- endmacro -%}
{% for message in messages %}
    {{ say(message.role, message.content, last=loop.last) }}
{% endfor %}
{{ messages | map(attribute='role') | unique | list | join(',') }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{% set seen = {'a': 1, 'b': [1, 2.5, none, true]} %}{{ seen | tojson }} {{ dict(a=1, b='é<>&"') | tojson(ensure_ascii=true) }}
"""

LOOPS = """\
{% for message in messages %}
  {% if message.role == 'system' %}
    {% continue %}
  {% endif %}
  {% generation %}
{{ message.content }}
  {% endgeneration %}
  {% if loop.index > 3 %}
    {% break %}
  {% endif %}
{% endfor %}
{# nothing is written here #}
\t{{ 'end' if add_generation_prompt else 'stop' }}
"""

#: name → (source, template variables).
TEMPLATES: dict[str, tuple[str, dict[str, Any]]] = {
    "chatml": (CHATML, {}),
    "default-system": (DEFAULT_SYSTEM, {}),
    "headers": (HEADERS, {"date_string": "1 January 2027"}),
    "inst": (INST, {}),
    "reasoning": (REASONING, {"enable_thinking": False}),
    "tools": (TOOLS, {}),
    "macros": (MACROS, {}),
    "loops": (LOOPS, {}),
    "crlf": (CHATML.replace("\n", "\r\n"), {}),
    "date": ("{{ bos_token }}{{ strftime_now('%Y-%m') }} {{ undefined_one }}|{{ eos_token }}", {}),
}

FUNCTIONS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Today\'s weather in a "city" <of> Österreich & 日本',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]

USER = {"role": "user", "content": "  Hällo 日本 👩‍👩‍👧 <b>&amp;</b> \"quoted\" 'text'\n"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [{"role": "system", "content": "Be brief.\n"}, USER],
    "turns": [
        {"role": "system", "content": "Ünïcode"},
        USER,
        {"role": "assistant", "content": " An answer. <think>x</think>\n\n y "},
        {"role": "user", "content": "<|im_end|> {{ 7 * 7 }} {% raw %}"},
    ],
    "reasoning": [
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "so", "reasoning": "because"},
    ],
    "calls": [
        USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "type": "function",
                    "function": {"name": "weather", "arguments": {"days": 2, "city": "Wien"}},
                }
            ],
        },
        {"role": "tool", "content": '{"°C": -3.5}', "name": "weather"},
        {"role": "assistant", "content": "Cold."},
        {"role": "user", "content": ""},
    ],
    "parts": [
        {
            "role": "user",
            "content": [{"type": "image", "url": "x"}, {"type": "text", "text": "What is it?"}],
        }
    ],
    "wrong-order": [{"role": "assistant", "content": "first"}, USER],
}
