"""A config in Python is read as values and never run."""

from __future__ import annotations

import time

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
        ("x = 'a' * 9", "not arithmetic on numbers"),
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


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("x = [1]\n" + "x = [x, x]\n" * 60 + "y = str(x)\n", id="str"),
        pytest.param("x = [1]\nz = [1]\n" + "x = [x, x]\nz = [z, z]\n" * 60 + "y = max(x, z)\n", id="max"),
        pytest.param("x = [1]\nz = [1]\n" + "x = [x, x]\nz = [z, z]\n" * 60 + "y = min(x, z)\n", id="min"),
        pytest.param("x = (1,)\n" + "x = (x, x)\n" * 15 + "y = {x}\n", id="set"),
        pytest.param("x = (1,)\n" + "x = (x, x)\n" * 15 + "y = {x: 1}\n", id="key"),
        pytest.param("x = {" + ", ".join(f"{number * (2**61 - 1)}: 1" for number in range(9_000)) + "}", id="hashes"),
        pytest.param("x = dict()\n" + "x = dict(a=x, b=x)\n" * 60, id="dict"),
        pytest.param(f"x = list({'a' * 50_000!r})\n" + "y = list(x)\n" * 20_000, id="copies"),
        pytest.param("y = [" + f"list({'a' * 5_000!r}), " * 300 + "]", id="copies in one value"),
        pytest.param("y = " + "str([" * 60 + "'\\\\'" + "])" * 60, id="escapes of escapes"),
        pytest.param("x = round(1, -(10**9))", id="round"),
        pytest.param("x = " + "not " * 50_000 + "1", id="not"),
        pytest.param("x = " + "-" * 50_000 + "1", id="minus"),
        pytest.param("x = " + "1 if 1 else " * 20_000 + "1", id="if"),
        pytest.param("x = " + "lambda: " * 3_000 + "1", id="lambda"),
        pytest.param("x = " + "y" * 100_000, id="long name"),
        pytest.param("x = " + "y" * 100_000 + "()", id="long call"),
    ],
)
def test_a_small_config_that_would_take_for_ever_is_refused_in_few_words(text: str) -> None:
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=r"^c\.py: ") as caught:
        read_python_config(text, "c.py")
    assert len(str(caught.value)) < 500
    assert time.monotonic() - begin < 8


def test_values_that_are_used_often_are_read() -> None:
    values = read_python_config("x = dict(a=[1, 2, {3}])\n" + "y = [x, x, {4: x, None: x, 0.5: x}]\n" * 1000, "c.py")
    assert values["y"][2][4] == values["x"] == {"a": [1, 2, {3}]}
