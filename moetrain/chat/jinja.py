"""Parts of the templates in Jinja, for programs that read `chat_template.jinja` beside a tokenizer.

The template of each row renders the same text as the row for the same messages, or raises an exception, because a
program that serves an export must not give the model text in a form that it was not trained on. It keeps the reasoning
of every turn. It requires `raise_exception` and a `tojson` with `separators`, which transformers, vLLM and SGLang
provide.
"""

TEXT = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content is mapping or (content is defined and content is not none and content is not iterable) -%}
{{ raise_exception('content is neither text nor a list of text parts') }}
{%- elif content -%}
{%- for part in content -%}
{%- if part is not mapping or part.type != 'text' or part.text is not string -%}
{{ raise_exception('a part of content is no text: give parts such as {"type": "text", "text": "..."}') }}
{%- endif -%}
{{ part.text }}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
"""Macro `text(content)`: the text of a message, given as text, as null or as a list of text parts."""

TOOLS_CHECK = """\
{%- if tools is string or tools is mapping -%}{{ raise_exception('tools must be a list of declarations') }}{%- endif -%}
"""
"""Refuses tools that are no list."""

MESSAGE_CHECKS = """\
{%- if message.name and message.name is not string -%}
{{ raise_exception('name of a message must be text') }}
{%- endif -%}
{%- if message.role not in ['system', 'user', 'assistant', 'tool'] -%}
{{ raise_exception('the role of a message must be system, user, assistant or tool') }}
{%- endif -%}
{%- if message.role != 'assistant' and (message.tool_calls or message.reasoning_content or message.reasoning
or message.thinking) -%}
{{ raise_exception('only an assistant has tool_calls or reasoning_content') }}
{%- endif -%}
{%- if message.role != 'tool' and message.tool_call_id -%}
{{ raise_exception('only a tool result has a tool_call_id') }}
{%- endif -%}
{%- if message.function_call or message.refusal or message.audio or message.annotations -%}
{{ raise_exception('function_call, refusal, audio and annotations are not supported: use tool_calls and content') }}
{%- endif -%}
"""
"""Refuses a `message` that no template can render."""

SYSTEM = (
    """\
{%- if tools -%}
"""
    + TOOLS_CHECK
    + """\
{%- endif -%}
{%- for message in messages -%}
"""
    + MESSAGE_CHECKS
    + """\
{%- if message.role != 'tool' and message.name -%}
{{- raise_exception('only a tool result may have a name') -}}
{%- endif -%}
{%- if message.role != 'system' -%}{%- set state.begun = true -%}
{%- elif state.begun -%}{{- raise_exception('system messages must stand before all others') -}}
{%- elif text(message.content) -%}
{%- set state.system = state.system ~ ('\\n\\n' if state.system else '') ~ text(message.content) -%}
{%- endif -%}
{%- endfor -%}
"""
)
"""Checks tools and messages, and sets `state.system` to the text of all system messages, which must come first. Needs
`state.begun` and `state.system`. Refuses names of messages other than tool results."""

REASONING = """\
{%- set state.reasoning = message.reasoning_content or message.reasoning or message.thinking or '' -%}
{%- if state.reasoning is not string -%}{{ raise_exception('reasoning_content must be text') }}{%- endif -%}
{%- if text(message.content).lstrip().startswith('<think>') -%}
{{ raise_exception('content begins with <think>: give the reasoning as reasoning_content') }}
{%- endif -%}
"""
"""Sets `state.reasoning` of an assistant's `message`."""

CALLS_CHECK = """\
{%- if message.tool_calls is string or message.tool_calls is mapping -%}
{{ raise_exception('tool_calls must be a list of calls') }}
{%- endif -%}
"""
"""Refuses tool_calls that are no list."""

CALL_NAME_CHECK = """\
{%- if call.function.name is not string or ':' in call.function.name -%}
{{ raise_exception('function.name of a call must be text without a colon') }}
{%- endif -%}
"""
"""Refuses a `call` without a name."""

ARGUMENTS = """\
{%- if call.function.arguments is mapping -%}{{ call.function.arguments | tojson }}
{%- elif call.function.arguments is string and call.function.arguments.strip().startswith('{') -%}
{{ call.function.arguments }}
{%- elif call.function.arguments is undefined or call.function.arguments is none or call.function.arguments == '' -%}{}
{%- else -%}{{ raise_exception('function.arguments must be an object, or its JSON text') }}
{%- endif -%}
"""
"""The arguments of a `call` as JSON text."""


def quoted(text: str) -> str:
    """Return a string literal of Jinja."""
    return "'" + text.replace("\\", "\\\\").replace("\n", "\\n").replace("'", "\\'") + "'"
