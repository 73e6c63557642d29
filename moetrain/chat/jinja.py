"""The chat template in Jinja, for programs that read `chat_template.jinja` beside a tokenizer.

It renders the same text as `chat/records.py` and `chat/template.py` for the same messages, or raises an exception,
because a program that serves an export must not give the model text in a form that it was not trained on. It keeps the
reasoning of every turn. It renumbers ids of calls to `functions.NAME:N`, and gives each result the new id of its call.
"""

JINJA = """{%- macro text(content) -%}
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
{%- set state = namespace(count=0, ids=[], reasoning='', id='') -%}
{%- if tools -%}
{%- if tools is string or tools is mapping -%}{{ raise_exception('tools must be a list of declarations') }}{%- endif -%}
<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>
{%- endif -%}
{%- for message in messages -%}
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
{%- if message.role == 'system' -%}
<|im_system|>{{ message.name or 'system' }}<|im_middle|>{{ text(message.content) }}<|im_end|>
{%- elif message.role == 'user' -%}
<|im_user|>{{ message.name or 'user' }}<|im_middle|>{{ text(message.content) }}<|im_end|>
{%- elif message.role == 'tool' -%}
{%- set state.id = '' -%}
{%- for pair in state.ids -%}
{%- if message.tool_call_id and pair[0] == message.tool_call_id -%}{%- set state.id = pair[1] -%}{%- endif -%}
{%- endfor -%}
{%- if not state.id -%}
{{ raise_exception('the tool_call_id of a tool result must be the id of a call of the last turn with calls') }}
{%- endif -%}
<|im_system|>{{ message.name or 'tool' }}<|im_middle|>## Return of {{ state.id }}
{{ text(message.content) }}<|im_end|>
{%- else -%}
{%- set state.reasoning = message.reasoning_content or message.reasoning or message.thinking or '' -%}
{%- if state.reasoning is not string -%}{{ raise_exception('reasoning_content must be text') }}{%- endif -%}
{%- if text(message.content).lstrip().startswith('<think>') -%}
{{ raise_exception('content begins with <think>: give the reasoning as reasoning_content') }}
{%- endif -%}
<|im_assistant|>{{ message.name or 'assistant' }}<|im_middle|><think>{{ state.reasoning }}</think>
{{- text(message.content) }}
{%- if message.tool_calls -%}
{%- if message.tool_calls is string or message.tool_calls is mapping -%}
{{ raise_exception('tool_calls must be a list of calls') }}
{%- endif -%}
{%- set state.ids = [] -%}
<|tool_calls_section_begin|>
{%- for call in message.tool_calls -%}
{%- if call.function.name is not string or ':' in call.function.name -%}
{{ raise_exception('function.name of a call must be text without a colon') }}
{%- endif -%}
{%- set state.id = 'functions.' ~ call.function.name ~ ':' ~ state.count -%}
{%- set state.count = state.count + 1 -%}
{%- set state.ids = state.ids + [[call.id, state.id]] -%}
<|tool_call_begin|>{{ state.id }}<|tool_call_argument_begin|>
{%- if call.function.arguments is mapping -%}{{ call.function.arguments | tojson }}
{%- elif call.function.arguments is string and call.function.arguments.strip().startswith('{') -%}
{{ call.function.arguments }}
{%- elif call.function.arguments is undefined or call.function.arguments is none or call.function.arguments == '' -%}{}
{%- else -%}{{ raise_exception('function.arguments must be an object, or its JSON text') }}
{%- endif -%}
<|tool_call_end|>
{%- endfor -%}
<|tool_calls_section_end|>
{%- endif -%}
<|im_end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"""
"""Requires `raise_exception` and a `tojson` with `separators`, which transformers, vLLM and SGLang provide."""
