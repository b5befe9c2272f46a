"""Chat templates of the kinds that published checkpoints have, written anew and in short.

A template's name is the model's whose form it has. `PARTS` take a message as a list of parts,
`TEXTS` as a text alone.
"""

from __future__ import annotations

from dataclasses import dataclass

ROLES = "{% for m in messages %}"
CONTENT = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ c['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}"
)
ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
)
CHAT_ML_END = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
LLAMA_3_HEAD = "'<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
LLAMA_3_END = (
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Template:
    """A chat template.

    Attributes:
        text: In Jinja.
        close: What ends an answer in it; empty where it writes nothing there.
        eos: The tokenizer's end-of-sequence token, where it is another than ``</s>``.
        image: What stands before a first question.
    """

    text: str
    close: str = "</s>"
    eos: str = "</s>"
    image: str = "<image>\n"


PARTS = {
    "llama-3.2-vision": Template(
        ROLES
        + "{% if loop.first %}{{ bos_token }}{% endif %}{{ "
        + LLAMA_3_HEAD
        + " }}"
        + CONTENT
        + "{{ '<|eot_id|>' }}{% endfor %}"
        + LLAMA_3_END,
        "<|eot_id|>",
        "<|end_of_text|>",
    ),
    "qwen2-vl": Template(
        ROLES + "{% if loop.first and m['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' }}"
        + CONTENT
        + "{{ '<|im_end|>\n' }}{% endfor %}"
        + CHAT_ML_END,
        "<|im_end|>",
        "<|end_of_text|>",
    ),
    "onevision": Template(
        ROLES + "{{ '<|im_start|>' + m['role'] + ' ' }}"
        "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}"
        "{% endfor %}{% if m['role'] != 'assistant' %}"
        "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + c['text'] }}"
        "{% endfor %}{% else %}"
        "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
        "{% generation %}{{ '\n' + c['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
        "{{ '<|im_end|>' }}{% endfor %}" + CHAT_ML_END,
        "<|im_end|>",
        "<|im_end|>",
        "<image>\n",
    ),
    "phi-3-vision": Template(
        ROLES + "{{ '<|' + m['role'] + '|>\n' }}" + CONTENT + "{{ '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "<|end|>",
        "<|end_of_text|>",
    ),
    "gemma": Template(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        + ROLES
        + ALTERNATE
        + "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
        + CONTENT
        + "{{ '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<end_of_turn>",
    ),
    "granite-vision": Template(
        "{{ '<|system|>\nA chat.\n' }}"
        + ROLES
        + "{{ '<|' + m['role'] + '|>\n' }}"
        + CONTENT
        + "{% if m['role'] == 'assistant' %}{{ '<|end_of_text|>' }}{% endif %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "<|end_of_text|>",
        "<|end_of_text|>",
    ),
    # Its answers are texts, its questions parts.
    "pixtral": Template(
        "{{ bos_token }}" + ROLES + ALTERNATE + "{% if m['role'] == 'user' %}{{ '[INST]' }}"
        "{% if m['content'] is not string %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}{{ '<image>' }}{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{% else %}{{ m['content'] }}{% endif %}{{ '[/INST]' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
        image="<image>",
    ),
    "named tools": Template(
        "{%- if tools is not none %}{{ '[TOOLS]' + (tools | tojson) }}{%- endif %}"
        "{%- set ns = namespace(first=true) %}"
        + ROLES
        + "{% if ns.first %}{{ bos_token }}{% set ns.first = false %}{% endif %}"
        "{{ m['role'].upper() + ': ' }}"
        + CONTENT
        + "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ ' ' }}{% endif %}"
        "{% if false %}{% break %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    ),
    # The next question's own token ends an answer.
    "glm": Template(
        ROLES + "{{ '<|' + m['role'] + '|>\n' }}" + CONTENT + "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "<|user|>",
    ),
}
TEXTS = {
    "llama-3": Template(
        ROLES + "{% set content = " + LLAMA_3_HEAD + " + m['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
        "{{ content }}{% endfor %}" + LLAMA_3_END,
        "<|eot_id|>",
        "<|end_of_text|>",
    ),
    # Writes the image itself, and nothing that a text says of one.
    "joycaption": Template(
        "{{ bos_token }}" + ROLES + "{{ " + LLAMA_3_HEAD + " }}"
        "{% if m['role'] == 'user' and loop.first %}{{ '<image>' }}{% endif %}"
        "{{ m['content'] | replace('<image>', '') | trim }}{{ '<|eot_id|>' }}{% endfor %}"
        + LLAMA_3_END,
        "<|eot_id|>",
        "<|end_of_text|>",
        "<image>",
    ),
    # Writes the image itself, above whatever a text says.
    "writes the image": Template(
        ROLES + "{{ m['role'].upper() + ': ' }}"
        "{% if loop.first %}{{ '<image>\n' }}{% endif %}{{ m['content'] }}"
        "{{ eos_token if m['role'] == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    ),
    "phi-3": Template(
        "{{ bos_token }}" + ROLES + "{% if (m['role'] == 'user') %}"
        "{{ '<|user|>\n' + m['content'] + '<|end|>\n<|assistant|>\n' }}"
        "{% elif (m['role'] == 'assistant') %}{{ m['content'] + '<|end|>\n' }}{% endif %}"
        "{% endfor %}",
        "<|end|>",
        "<|end_of_text|>",
    ),
    "mistral": Template(
        "{{ bos_token }}" + ROLES + ALTERNATE + "{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
        "{{ m['content'] + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
        "{% endif %}{% endfor %}",
    ),
    "llama-2": Template(
        ROLES + ALTERNATE + "{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        " </s>",
    ),
    "vicuna": Template(
        "{% set system_message = 'A chat.' %}{% if messages[0]['role'] == 'system' %}"
        "{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
        "{% else %}{% set loop_messages = messages %}{% endif %}{{ system_message }}"
        "{% for m in loop_messages %}{% set content = m['content'] %}"
        "{% if m['role'] == 'user' %}{{ 'USER: ' + content + ' ASSISTANT:' }}"
        "{% elif m['role'] == 'assistant' %}{{ content + '</s>' }}{% endif %}{% endfor %}",
    ),
    "chatml": Template(
        ROLES + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}" + CHAT_ML_END,
        "<|im_end|>",
    ),
    "deepseek": Template(
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
        "{% endif %}{{ bos_token }}" + ROLES + "{% if m['role'] == 'user' %}"
        "{{ 'User: ' + m['content'] + '\n\n' }}{% elif m['role'] == 'assistant' %}"
        "{{ 'Assistant: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    ),
    # Words that end a turn and are no token.
    "no tokens": Template(
        ROLES + "{{ 'the ' + m['role'] + ': ' + m['content'] + ' STAR:\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'the assistant: ' }}{% endif %}",
        " STAR:",
    ),
    "content must be a text": Template(
        ROLES + "{% if m['content'] is not string %}"
        "{{ raise_exception('content must be a string') }}{% endif %}"
        "{{ '<|' + m['role'] + '|>' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    ),
    "drops what is no text": Template(
        ROLES + "{{ '<|' + m['role'] + '|>' }}{% if m['content'] is string %}{{ m['content'] }}"
        "{% endif %}{{ '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    ),
    "drops images": Template(
        ROLES + "{{ '<|' + m['role'] + '|>' }}{% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}"
        "{% endif %}{{ '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    ),
    "prints as JSON": Template(
        ROLES + "{% set c = m['content'] if m['content'] is string else m['content'] | tojson %}"
        "{{ '<|' + m['role'] + '|>' + c + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    ),
}
TEMPLATES = {**PARTS, **TEXTS}
TOKENS = (
    *("<unk>", "<s>", "</s>", "<pad>", "<image>"),
    *("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
    *("<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    *("<start_of_turn>", "<end_of_turn>"),
)
