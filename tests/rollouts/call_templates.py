"""Chat templates that write calls as known families do, and nothing else that those write."""

from __future__ import annotations

_SHOWN = "{% if tools %}<|system|>{{ tools | tojson }}<|end|>{% endif %}"
_TURN = "<|{{ m.role }}|>{{ m.content or '' }}"
_NEXT = "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
_CALLS = "{% for c in m.tool_calls %}{% set f = c.function %}"
_ARGUMENTS = "{{ f.arguments | tojson }}"


def _template(calls: str, *, shown: str = _SHOWN, before: str = "", after: str = "") -> str:
    """Return a template with a text for each call, and around all calls of a turn."""
    whole = f"{{% if m.tool_calls %}}{before}{_CALLS}{calls}{{% endfor %}}{after}{{% endif %}}"
    return shown + "{% for m in messages %}" + _TURN + whole + _NEXT


_PARAMETERS = (
    "{% for k, v in f.arguments.items() %}OPEN{{ v if v is string else v | tojson }}CLOSE"
    "{% endfor %}"
)


def _tags(before: str, opening: str, closing: str, after: str) -> str:
    return before + _PARAMETERS.replace("OPEN", opening).replace("CLOSE", closing) + after


_PYTHON = (
    "{% if m.tool_calls %}OPEN[{% for c in m.tool_calls %}{% set f = c.function %}{{ f.name }}("
    "{% for k, v in f.arguments.items() %}{{ k }}={{ v | tojson if v is string else v }}"
    "{{ ', ' if not loop.last }}{% endfor %}){{ ', ' if not loop.last }}{% endfor %}]CLOSE"
    "{% endif %}"
)

_BEGIN, _END = "<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>"
_CALL_BEGIN = "<\uff5ctool\u2581call\u2581begin\uff5c>"
_CALL_END, _SEP = "<\uff5ctool\u2581call\u2581end\uff5c>", "<\uff5ctool\u2581sep\uff5c>"

FAMILIES: dict[str, tuple[str, str]] = {
    "hermes": (
        "hermes",
        _template(
            '<tool_call>\n{"name": "{{ f.name }}", "arguments": ' + _ARGUMENTS + "}\n</tool_call>"
        ),
    ),
    "qwen3_coder": (
        "qwen3_coder",
        _template(
            _tags(
                "<tool_call>\n<function={{ f.name }}>\n",
                "<parameter={{ k }}>\n",
                "\n</parameter>\n",
                "</function>\n</tool_call>",
            )
        ),
    ),
    "glm": (
        "glm",
        _template(
            _tags(
                "\n<tool_call>{{ f.name }}\n",
                "<arg_key>{{ k }}</arg_key>\n<arg_value>",
                "</arg_value>\n",
                "</tool_call>",
            )
        ),
    ),
    "kimi": (
        "kimi",
        _template(
            "<|tool_call_begin|>functions.{{ f.name }}:{{ loop.index0 }}"
            "<|tool_call_argument_begin|>" + _ARGUMENTS + "<|tool_call_end|>",
            before="<|tool_calls_section_begin|>",
            after="<|tool_calls_section_end|>",
        ).replace(
            "{{ m.content or '' }}",
            "{% if m.role == 'tool' %}## Return of {{ m.tool_call_id }}\n{% endif %}"
            "{{ m.content or '' }}",
        ),
    ),
    "deepseek_v3": (
        "deepseek",
        _template(
            f"{_CALL_BEGIN}function{_SEP}{{{{ f.name }}}}\n```json\n{_ARGUMENTS}\n```{_CALL_END}",
            shown="{% if messages[0].role == 'system' %}{% endif %}",
            before=_BEGIN,
            after=_END,
        ),
    ),
    "deepseek_v31": (
        "deepseek",
        _template(
            f"{_CALL_BEGIN}{{{{ f.name }}}}{_SEP}{_ARGUMENTS}{_CALL_END}",
            before=_BEGIN,
            after=_END,
        ),
    ),
    "llama_json": (
        "json",
        _template('{"name": "{{ f.name }}", "parameters": ' + _ARGUMENTS + "}"),
    ),
    "llama_python": (
        "pythonic",
        _SHOWN
        + "{% for m in messages %}"
        + _TURN
        + _PYTHON.replace("OPEN", "").replace("CLOSE", "")
        + _NEXT,
    ),
    "lfm2": (
        "lfm2",
        _SHOWN
        + "{% for m in messages %}"
        + _TURN
        + _PYTHON.replace("OPEN", "<|tool_call_start|>").replace("CLOSE", "<|tool_call_end|>")
        + _NEXT,
    ),
    "mistral_list": (
        "json",
        _template(
            '{"name": "{{ f.name }}", "arguments": '
            + _ARGUMENTS
            + ', "id": "{{ c.id }}"}{{ ", " if not loop.last }}',
            before="[TOOL_CALLS][",
            after="]",
        ).replace(
            "{{ m.content or '' }}",
            "{% if m.role == 'tool' %}{{ m.tool_call_id }}: {% endif %}{{ m.content or '' }}",
        ),
    ),
    "mistral": (
        "mistral",
        _template(
            "[TOOL_CALLS]{{ f.name }}[CALL_ID]{{ c.id }}[ARGS]" + _ARGUMENTS,
        ),
    ),
    "granite": (
        "granite",
        "{% if tools %}<|system|>Answer with <|tool_call|> and a list. {{ tools | tojson }}"
        "<|end|>{% endif %}{% for m in messages %}" + _TURN + _NEXT,
    ),
    "phi4": (
        "phi4",
        "{% for m in messages %}"
        + _TURN
        + "{% if m.tools %}<|tool|>{{ m.tools }}<|/tool|>{% endif %}"
        + _NEXT,
    ),
    "harmony": (
        "harmony",
        "{% if tools %}<|start|>system<|message|>{{ tools | tojson }}<|end|>{% endif %}"
        "{% for m in messages %}{% if m.role == 'tool' %}<|start|>functions.{{ m.name }}"
        " to=assistant<|channel|>commentary<|message|>{{ m.content }}<|end|>"
        "{% elif m.tool_calls %}{% set f = m.tool_calls[0].function %}"
        "<|start|>assistant to=functions.{{ f.name }}<|channel|>commentary json<|message|>"
        + _ARGUMENTS
        + "<|call|>{% elif m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>"
        "{{ m.content }}<|{{ 'return' if loop.last else 'end' }}|>"
        "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    ),
    "minimax": (
        "minimax",
        _template(
            _tags(
                '<invoke name="{{ f.name }}">\n',
                '<parameter name="{{ k }}">',
                "</parameter>\n",
                "</invoke>\n",
            ),
            before="\n<minimax:tool_call>\n",
            after="</minimax:tool_call>",
        ),
    ),
}
"""Name of a family: the name of its form, and a template."""

REAL: dict[str, str] = {
    "llamacpp-NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes",
    "trl-qwen3_instruct_2507": "hermes",
    "llamacpp-ibm-granite-granite-4.0": "hermes",
    "llamacpp-Qwen3-Coder": "qwen3_coder",
    "trl-qwen3_5_think": "qwen3_coder",
    "trl-glm4moe": "glm",
    "llamacpp-moonshotai-Kimi-K2": "kimi",
    "trl-deepseekv3": "deepseek",
    "llamacpp-deepseek-ai-DeepSeek-V3.1": "deepseek",
    "llamacpp-deepseek-ai-DeepSeek-V3.2": "deepseek_dsml",
    "trl-llama3_1": "json",
    "llamacpp-meta-llama-Llama-3.2-3B-Instruct": "json",
    "trl-lfm2_2_5": "lfm2",
    "llamacpp-mistralai-Mistral-Nemo-Instruct-2407": "json",
    "llamacpp-Mistral-Small-3.2-24B-Instruct-2506": "mistral",
    "llamacpp-unsloth-mistral-Devstral-Small-2507": "mistral",
    "llamacpp-ibm-granite-granite-3.3-2B-Instruct": "granite",
    "ollama-phi4_mini_3_8b": "phi4",
    "trl-gptoss": "harmony",
    "llamacpp-MiniMax-M2": "minimax",
}
"""Name of a file that `tests.fuzz.templates` fetches: the name of its form."""

DROPS_THOUGHTS = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.index0 < ns.last %}"
    "{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}"
    + _NEXT
)
"""Drops the thoughts of the assistant before the last message of the user, as Qwen3's does."""
