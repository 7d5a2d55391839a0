#!/usr/bin/env bash
# lmms-eval 0.7.2: POPE's yes ratio is that of the references, whatever the model answers.
#
# Seen: pope_aggregate_yes_ratio counts each result's "ground_truth" and never its "prediction". A model that always says
# yes, one that always says no and one that says nothing get the same ratio. POPE reports the ratio to show how far a
# model leans towards yes, and counts the answers.
# What follows for Dianjing: "says yes" of POPE is the share of answers; docs/eval.md says that the figure differs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps lmms-eval==0.7.2
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import distribution
from importlib.util import module_from_spec, spec_from_file_location

package = distribution("lmms-eval")
print("lmms-eval", package.version)
# By its path: importing the packages above it would need torch and every model.
spec = spec_from_file_location("pope_utils", package.locate_file("lmms_eval/tasks/pope/utils.py"))
pope = module_from_spec(spec)
spec.loader.exec_module(pope)

ratios = set()
for answer in ("yes", "no", ""):
    questions = [{"question_id": number, "answer": label} for number, label in enumerate(("yes", "no", "no", "no"))]
    results = [pope.pope_process_results(question, [answer])["pope_yes_ratio"] for question in questions]
    ratios.add(pope.pope_aggregate_yes_ratio(results))
    print(f"always {answer!r}: accuracy {pope.pope_aggregate_accuracy(results)}, yes ratio {ratios}")
assert ratios == {0.25}
PYTHON
echo "seen as described: the yes ratio does not depend on the answers"
