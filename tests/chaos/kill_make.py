"""Kill `dianjing make` with SIGKILL at random moments; then nothing paid for is lost, and nothing is paid for twice.

By hand, with more kills than the test makes:

    python -m tests.chaos.kill_make --kills 20 --seed 1
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dianjing.cli.main import main
from dianjing.make import send
from dianjing.make.pictures import data_uri
from tests.chaos.endpoint import Endpoint, Hit
from tests.chaos.pictures import write_pictures

CONCURRENCY = 4
FAULTS = {0: "drop", 1: "limited", 2: "wrong_schema", 3: "prose", 4: "refusal_field", 5: "half_body"}


def behaviour(hit: Hit) -> str:
    """Misbehave at the first call about some pictures, the same ones each time; a re-ask is answered."""
    fault = FAULTS.get(int(hit.picture[:8], 16) % 12, "")
    if fault in ("prose", "refusal_field"):  # these replies count, so they must not change
        return fault
    return fault if not hit.number and not hit.again else ""


@dataclass(frozen=True)
class Outcome:
    """What a run that was killed left behind, and what one that was not did."""

    kills: int
    hits: int
    """Calls that reached the endpoint, over all the killed runs."""
    undisturbed_hits: int
    sent: int
    """Calls that the journal knows."""
    without_outcome: int
    """Of those, the ones under way at a kill."""
    lost: list[str]
    """Replies that were journaled once and then asked for again."""
    asked_too_often: list[str]
    """Requests answered more often than kills explain."""
    same_file: bool
    records: int


def _child(arguments: list[str]) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    send.RETRY_SECONDS = 0.05
    sys.exit(main(arguments))


def _context() -> multiprocessing.context.ForkServerContext:
    """Return processes that begin with everything imported: a kill should meet the work, not an import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["openai", "dianjing.make.run", "dianjing.cli.make"])
    return context


def kill_and_compare(folder: Path, kills: int, pictures: int, seed: int) -> Outcome:
    """Run undisturbed; run again, killed `kills` times and then left alone; compare."""
    rng = random.Random(seed)
    names = write_pictures(folder / "images", pictures)
    context = _context()

    def arguments(endpoint: Endpoint, out: Path) -> list[str]:
        command = ["make", str(folder / "images"), "--out", str(out), "--model", "m", "--base-url", endpoint.url]
        return [*command, "--prompts", "conversation", "--concurrency", str(CONCURRENCY), "--held-out", "0.2"]

    with Endpoint(behaviour, delay_seconds=0.02) as endpoint:
        undisturbed = context.Process(target=_child, args=(arguments(endpoint, folder / "calm" / "data.json"),))
        undisturbed.start()
        undisturbed.join()
        calm_hits = len(endpoint.hits)
    with Endpoint(behaviour, delay_seconds=0.02) as endpoint:
        out = folder / "killed" / "data.json"
        killed = 0
        while killed < kills:
            # After so many calls more, and a moment within the next one.
            wanted = len(endpoint.hits) + rng.randint(0, max(1, 2 * (pictures - killed) // kills))
            process = context.Process(target=_child, args=(arguments(endpoint, out),))
            process.start()
            while process.is_alive() and len(endpoint.hits) < wanted:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.06))
            killed += process.is_alive()
            process.kill()
            process.join()
            if process.exitcode is not None and process.exitcode >= 0:
                break  # it came to its end before
        process = context.Process(target=_child, args=(arguments(endpoint, out),))
        process.start()
        process.join()
        return _outcome(folder, names, endpoint, killed, calm_hits)


def _outcome(folder: Path, names: list[str], endpoint: Endpoint, kills: int, calm_hits: int) -> Outcome:
    digests = {hashlib.sha256(data_uri(str(folder / "images"), n, 1024).encode()).hexdigest(): n for n in names}
    served = Counter({digests[picture]: 0 for picture in digests})
    for (picture, _, _), number in endpoint.served.items():
        served[digests[picture]] += number
    lines = [json.loads(line) for line in (folder / "killed" / "data.journal.jsonl").read_text().splitlines()]
    image_of = {line["key"]: line["image"] for line in lines if line.get("status") == "sent"}
    sent = Counter(line["image"] for line in lines if line.get("status") == "sent")
    outcomes = [line for line in lines if line.get("status") not in (None, "sent")]
    ended = Counter(image_of[line["key"]] for line in outcomes)
    replies = Counter(image_of[line["key"]] for line in outcomes if line["status"] != "failed")
    final = Counter(image_of[line["key"]] for line in outcomes if line["status"] in ("ok", "refused"))
    calm, killed = (folder / name for name in ("calm", "killed"))
    files = ("data.json", "data_held_out.json")
    return Outcome(
        kills=kills,
        hits=len(endpoint.hits),
        undisturbed_hits=calm_hits,
        sent=sent.total(),
        without_outcome=(sent - ended).total(),
        lost=[name for name in names if final[name] != 1],
        asked_too_often=[name for name in names if served[name] - replies[name] > sent[name] - ended[name]],
        same_file=all((calm / file).read_bytes() == (killed / file).read_bytes() for file in files),
        records=len(json.loads((killed / "data.json").read_text())),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(kill_and_compare(Path(folder), given.kills, given.pictures, given.seed))
