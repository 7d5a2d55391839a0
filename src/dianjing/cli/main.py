"""`dianjing VERB ...`: finds the verb, runs it, prints errors of the input without a traceback."""

from __future__ import annotations

import difflib
import errno
import importlib
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress

from dianjing import __version__
from dianjing.errors import ConfigError, DianjingError
from dianjing.language import choose_language, say
from dianjing.output import finish_output, open_output

VERBS = {
    "demo": "watch a blind model learn to see, on drawn scenes",
    "make": "make records about pictures with a vision model behind an OpenAI-compatible endpoint",
    "check": "find faults in a data set, and fix those that are certain",
    "recipes": "list the shipped recipes, copy one, or write those that fit your data",
    "show": "show what the model sees of each record, and what it learns from it",
    "import": "make a run of a checkpoint of XTuner or LLaVA, or an LLM's folder of a GGUF file",
    "plan": "say before a run what it takes: memory by part, on which GPUs it fits, how long it lasts",
    "train": "train what a recipe says",
    "chat": "ask a model about pictures",
    "eval": "score a model with the right picture, with another one, and with none",
    "compare": "show the answers of several models next to the pictures, on one HTML page",
    "export": "write a run for other programs to load, proved to answer as the run does",
    "serve": "answer over HTTP as OpenAI's API does, on this machine",
    "doctor": "say what is installed, missing or wrong on this machine, with a short self-test",
    "studio": "review records, follow runs and ask models on a page of this machine",
    "completion": "print what lets a shell complete verbs, flags and recipes",
}
"""Each is the module of that name here, imported only when it is called; the text is its SUMMARY."""
ELSEWHERE = {
    "merge": "dianjing export RUN OUT, which adds the adapters to the weights",
    "convert": "dianjing export RUN OUT --format NAME; dianjing import reads a checkpoint",
    "list-cfg": "dianjing recipes",
    "copy-cfg": "dianjing recipes copy NAME",
    "log-dataset": "dianjing show DATA",
    "check-custom-dataset": "dianjing check DATA",
    "test": "dianjing eval RUN DATA",
    "mmbench": "dianjing eval RUN FILE --benchmark mmbench",
    "eval_refcoco": "dianjing eval RUN FILE --benchmark refcoco",
}
"""XTuner's verbs, and what does the same here."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    open_output()
    try:
        return _code(given[0] if given else "--help", given[1:])
    finally:
        finish_output()


def _code(verb: str, arguments: list[str]) -> int:
    """Return the exit code of a verb, its errors printed."""
    try:
        try:
            words = choose_language([verb, *arguments])
            return _run(words[0] if words else "--help", words[1:])
        finally:
            with suppress(BrokenPipeError):  # a verb that has done its work keeps its exit code
                sys.stdout.flush()
    except DianjingError as error:
        print(say("error: {error}", error=error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(say("interrupted"), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (`| head`) has enough
        return 0
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and error.filename is None:
            raise
        remedy = "make room on that disk" if full else "name another, or see that it can be read and written"
        print(f"error: {error.filename or 'a file'}: {error.strerror}; {remedy}", file=sys.stderr)
        return 2


def _run(verb: str, arguments: list[str]) -> int:
    if verb == "help" and arguments:
        verb, arguments = arguments[0], ["--help"]
    if verb in ("help", "-h", "--help", "-V", "--version", "version"):
        print(f"dianjing {__version__}" if "version" in verb or verb == "-V" else _help())
        return 0
    if verb not in VERBS:
        if verb in ELSEWHERE:
            raise ConfigError(f"'{verb}' is called otherwise here: {ELSEWHERE[verb]}")
        near = difflib.get_close_matches(verb, VERBS, n=1)
        offer = f"; did you mean '{near[0]}'?" if near else f"; there are {', '.join(VERBS)}"
        raise ConfigError(f"unknown verb '{verb}'{offer}")
    # Models are folders on this machine. No library looks elsewhere by itself, whatever a folder names; a model of the
    # hub that the user names is downloaded in the open (model/hub.py), unless HF_HUB_OFFLINE was set before.
    os.environ.setdefault("DIANJING_ONLINE", "0" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it; on some CPUs it advertises a package
    return importlib.import_module(f"dianjing.cli.{verb}").run(arguments)


def _help() -> str:
    indent = max(map(len, VERBS)) + 4
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    lines = [
        textwrap.fill(f"  {verb:{indent - 4}}  {say(summary)}", max(width, 2 * indent), subsequent_indent=" " * indent)
        for verb, summary in VERBS.items()
    ]
    return "\n".join(
        [
            "usage: dianjing VERB ...",
            "",
            *lines,
            "",
            say("`dianjing VERB --help` says more about one; `--lang zh` or `--lang en` chooses the language."),
        ]
    )
