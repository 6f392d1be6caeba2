"""Conversations, and templates of known form, for tests."""

import json
from pathlib import Path
from typing import Any

CHATML = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
SYSTEM_DEFAULT = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a model.<|im_end|>\\n' }}{% endif %}
""" + CHATML.removesuffix("\n")
LLAMA_3 = """\
{{- bos_token }}
{%- macro header(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}{%- endmacro %}
{%- for message in messages %}
    {%- if (message.role == 'user') and loop.index0 > 0 and messages[loop.index0 - 1].role == 'user' %}
        {{- raise_exception('two of the user in a row') }}
    {%- endif %}
    {{- header(message['role']) }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{ message['content'] | trim }}{{ eos_token }}{% endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- header('assistant') }}
{%- endif %}
"""
INSTRUCT = """\
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}{% set ns.system = message.content + '\\n' %}{% continue %}{% endif %}
{%- if message.role == 'user' %}
{{- '[INST] ' + ns.system + message.content + ' [/INST]' }}{% set ns.system = '' %}
{%- elif message.role == 'tool' %}
{{- '[TOOL] ' + {'content': message.content} | tojson + ' [/TOOL]' }}
{%- else %}
{%- generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}
{%- endif %}
{%- endfor %}
"""
TEMPLATES = {"chatml": CHATML, "system default": SYSTEM_DEFAULT, "llama 3": LLAMA_3, "instruct": INSTRUCT}
ENDS = {"chatml": "<|im_end|>", "system default": "<|im_end|>", "llama 3": "<|eot_id|>", "instruct": "</s>"}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>"]


def unmarked(template: str) -> str:
    """Return a template that writes the same, and does not mark what the assistant says."""
    return template.replace("endgeneration %}", "endif %}").replace("generation %}", "if true %}")


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [said("user", "Hi"), said("assistant", "Hello!")],
    [said("system", "Be brief."), said("user", "What is 2 + 2?"), said("assistant", "4")],
    [
        said("user", "naïve 日本"),
        said("assistant", "ünïcode 日本語 😀"),
        said("user", "x"),
        said("assistant", "  y\n\n z"),
    ],
    [said("user", "a"), said("assistant", "b" * 300), said("tool", '{"c": 1}'), said("assistant", "\n")],
    [said("user", "Hello! Hello!"), said("assistant", "Hello! Hello!"), said("user", "{{ 1 }} {% x %}\n\n")],
]


def many(number: int) -> list[list[dict[str, Any]]]:
    """Return conversations of lengths from short to long, no two alike."""
    found = []
    for one in range(number):
        turns = [said("system", f"Answer {one}.")] if one % 3 == 0 else []
        for turn in range(1 + one % 3):
            turns += [
                said("user", f"What is {one} + {turn}?"),
                said("assistant", f"{one + turn} " * (1 + one * 7 % 11)),
            ]
        found.append(turns)
    return found


def write(path: Path, conversations: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in conversations))
    return path


def tokenizer(folder: Path, template: str = "", end: str = "</s>") -> Path:
    """Make a byte-level BPE with the special tokens of all templates, and return its folder."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator([json.dumps(one) for one in many(30)], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": end}
    about |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder
