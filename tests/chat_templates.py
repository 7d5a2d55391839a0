"""Chat templates that behave as those of the families do, and tokenizers that carry them."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKS_LAST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DATED = HEADERS.replace(
    "{{ bos_token }}{% for m in messages %}",
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday: {{ strftime_now('%d %b %Y') }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}<|eot_id|>"
    "{% for m in messages if m.role != 'system' %}",
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}" + CHATML
)
RUN_TOGETHER = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
OLMO = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MINICPM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<用户>{{ m.content.strip() }}<AI>"
    "{% else %}{{ m.content.strip() }}{{ eos_token }}{% endif %}{% endfor %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
INST_TOKENS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
INST_EACH = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content.strip() }} [/INST]"
    "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
VICUNA = (
    "Be kind. {% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} ASSISTANT:"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}{{ m.role.upper() }}: {% for p in m.content %}{{ p.text ~ ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PIPES = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|> {{ m.content }}<|stop|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
REASONS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>"
    "{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
CUTS = CHATML.replace("m.content", "(m.content if loop.last else m.content[:40])")
SHOUTS = CHATML.replace("m.content", "m.content | upper")
ESCAPES = "{{ ''.__class__.__mro__ }}" + CHATML
RUNS = "{{ cycler.__init__.__globals__.os.popen('touch ran').read() }}" + CHATML

IM = ("<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@dataclass(frozen=True)
class Family:
    """A chat template and the special tokens of its tokenizer."""

    chat_template: str | None
    special: tuple[str, ...] = ()
    bos: str | None = "<s>"
    eos: str = "</s>"

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a tokenizer of bytes with the special tokens."""
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(list(dict.fromkeys([*filter(None, (self.bos, self.eos)), *self.special])))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=self.bos, eos_token=self.eos)
        tokenizer.chat_template = self.chat_template
        return tokenizer


FAMILIES = {
    "internlm2": Family("{{ bos_token }}" + CHATML, IM),
    "qwen2": Family(DEFAULT_SYSTEM, (*IM, "<|endoftext|>"), None, IM[1]),
    "qwen3": Family(THINKS_LAST, (*IM, "<|endoftext|>"), None, IM[1]),
    "llama3": Family(HEADERS, LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "llama3.2": Family(DATED, LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "mistral": Family(INST),
    "mistral, its marks being tokens": Family(INST_TOKENS, ("[INST]", "[/INST]")),
    "llama2": Family(INST_EACH),
    "phi3": Family(PHI, ("<|user|>", "<|end|>", "<|assistant|>", "<|endoftext|>"), "<s>", "<|endoftext|>"),
    "gemma": Family(GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "vicuna": Family(VICUNA),
    "phi4 mini": Family(
        RUN_TOGETHER, ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"), "<|endoftext|>", "<|endoftext|>"
    ),
    "olmo2": Family(OLMO, ("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>"),
    "minicpm": Family(MINICPM),
    "unheard of": Family(PIPES, ("<|stop|>",)),
}
