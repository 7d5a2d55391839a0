#!/usr/bin/env bash
# lmms-eval 0.7.2: correct answers to MMMU's open questions are scored as wrong.
#
# Seen: parse_open_response returns a list of strings and numbers; mmmu_process_results keeps str() of its first entry
# alone. eval_open then goes through that string letter by letter and looks for the reference within each letter, where
# no reference can be. The answer "24" to a question whose reference is "24" is "Wrong"; with the whole list, as MMMU's
# own program passes it, eval_open calls it correct. So mmmu_val counts every open question as wrong.
# What follows for Dianjing: open questions of MMMU count by MMMU's own rule; docs/eval.md says that the figure differs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.2.6 pyyaml==6.0.3 loguru==0.7.3
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps lmms-eval==0.7.2
"$folder/venv/bin/python" - <<'PYTHON'
import importlib
import io
import sys
from contextlib import redirect_stdout
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

print("lmms-eval", distribution("lmms-eval").version)
# The packages' own __init__.py import torch and every model; the module that scores MMMU needs none of that.
root = find_spec("lmms_eval").submodule_search_locations[0]
for name in ("lmms_eval", "lmms_eval.tasks", "lmms_eval.tasks.mmmu"):
    package = ModuleType(name)
    package.__path__ = [root + "/" + "/".join(name.split(".")[1:])]
    sys.modules[name] = package
# The package lacks this file, which the module reads as it is imported; of the repository's it needs this one setting.
template = Path(root, "tasks/mmmu/_default_template_yaml")
print("its mmmu/_default_template_yaml is there:", template.exists())
template.write_text("metadata:\n  interleaved_format: false\n")
# The part that asks another model for its opinion; the rules measured here do not use it.
judge = sys.modules["lmms_eval.llm_judge"] = ModuleType("lmms_eval.llm_judge")
judge.ServerConfig = judge.get_server = lambda *given, **named: None
mmmu = importlib.import_module("lmms_eval.tasks.mmmu.utils")



def scored(question, answer):
    with redirect_stdout(io.StringIO()):  # It prints a line for each domain.
        return mmmu.mmmu_aggregate_results([mmmu.mmmu_process_results(question, [answer])["mmmu_acc"]])


for reference, answer in (("24", "24"), ("24", "The answer is 24."), ("copper", "copper"), ("copper", "It is copper.")):
    question = {"id": "validation_Math_1", "question_type": "open", "answer": reference}
    accuracy = scored(question, answer)
    whole = mmmu.eval_open(reference, mmmu.parse_open_response(answer))
    print(f"reference {reference!r}, answer {answer!r}: mmmu_acc {accuracy}; eval_open of the whole list: {whole}")
    assert accuracy == 0
    assert whole
choice = {"id": "validation_Math_2", "question_type": "multiple-choice", "answer": "B", "options": "['1', '2']"}
accuracy = scored(choice, "B")
print("a question with options, answered right: mmmu_acc", accuracy)
assert accuracy == 1
PYTHON
echo "seen as described: correct open answers are scored as wrong"
