"""A config in Python is read as values and never run."""

from __future__ import annotations

import pytest

from dianjing.errors import ConfigError
from dianjing.formats.python_config import read_python_config

SHIPPED = '''
"""A docstring."""
import torch
from mmengine.hooks import CheckpointHook as Hook
from transformers import AutoModelForCausalLM
from xtuner.utils import PROMPT_TEMPLATE
# Data
root: str = './data/'
path = root + 'LLaVA-Pretrain/data.json'
prompt_template = PROMPT_TEMPLATE.internlm2_chat
max_length = int(2048 - (336 / 14)**2)
a = b = -2
llm = dict(type=AutoModelForCausalLM.from_pretrained, torch_dtype=torch.float16, layers=[a, b], empty={})
more = dict(x=1, **llm)
'''


def test_what_xtuners_configs_consist_of_is_read() -> None:
    values = read_python_config(SHIPPED, "c.py")
    assert values["path"] == "./data/LLaVA-Pretrain/data.json"
    assert values["max_length"] == 1472
    assert values["prompt_template"] == "xtuner.utils.PROMPT_TEMPLATE.internlm2_chat"
    assert values["llm"] == {
        "type": "transformers.AutoModelForCausalLM.from_pretrained",
        "torch_dtype": "torch.float16",
        "layers": [-2, -2],
        "empty": {},
    }
    assert values["more"] == {"x": 1, **values["llm"]}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("_base_ = './other.py'", "builds on another config"),
        ("with read_base():\n    from .x import *", "builds on another config"),
        ("x = open('/etc/passwd')", r"open\(...\) would have to be run"),
        ("x = __import__('os').system('ls')", "would have to be run"),
        ("x = dict(a=exec('1'))", r"exec\(...\) would have to be run"),
        ("x = [i for i in range(9)]", "would have to be run"),
        ("x = lambda: 1", "would have to be run"),
        ("x = y", "'y' is not set above"),
        ("x = torch.float16", "'torch' is not set above"),
        ("x = 10**10**10", "too large"),
        ("x = 'a' * 9", "no arithmetic on numbers"),
        ("x = 1 / 0", "division by zero"),
        ("import os\nos.system('ls')", "a Expr statement"),
        ("for i in range(3):\n    x = i", "a For statement"),
        ("def f(): ...", "a FunctionDef statement"),
        ("x = (", "not a config in Python"),
        ("x = " + "-" * 5000 + "1", "c.py"),
    ],
)
def test_what_only_running_could_tell_is_refused_by_line(line: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_python_config(f"y_ = 1\n{line}\n", "c.py")


def test_texts_cannot_grow_without_end() -> None:
    doubling = "x = 'aaaaaaaa'\n" + "x = x + x\n" * 60
    with pytest.raises(ConfigError, match=r"c\.py: line 15: a value that is too large"):
        read_python_config(doubling, "c.py")
