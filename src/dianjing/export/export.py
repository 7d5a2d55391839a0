"""LoadedModel -> a folder that other programs load, in one of FORMATS, kept only if it answers as the run does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from safetensors import SafetensorError

from dianjing.errors import DianjingError, ExportError
from dianjing.export.card import write_card
from dianjing.export.formats import DEFAULTS, Code, Dtype, Options, find_format, require_taken
from dianjing.export.receipt import Proof, drawn_cases, write_receipt
from dianjing.infer.generate import Conversation, LoadedModel
from dianjing.model.projector import name_of


def export(
    loaded: LoadedModel,
    out: Path,
    conversations: Sequence[Conversation] = (),
    format: str = "hf",
    options: Options = DEFAULTS,
) -> Proof:
    """Write the model to `out` with its receipt and model card, and return what was compared.

    It is written next to `out` and gets its name last: a folder of that name is a proven export.

    Raises:
        ExportError: `out` exists, the model cannot be exported, or the export does not equal the run.
    """
    require_free(out)
    code = find_format(format).code
    _require_held(loaded, format, options)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="unproven-", dir=out.parent, ignore_cleanup_errors=True) as place:
            unproven = Path(place, out.name)
            unproven.mkdir()
            code.save(loaded, unproven, options)
            proof = _prove(code, loaded, unproven, [*conversations, *drawn_cases()], options)
            write_receipt(loaded, unproven, format, proof)
            write_card(loaded, unproven, format, proof)
            unproven.rename(out)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{out}: cannot be written: {error}; make room, or choose another place") from error
    return proof


def require_free(out: Path) -> None:
    """Refuse to write over what is there, and to begin what could not get its name.

    Raises:
        ExportError: there is something of that name, or nothing can have it.
    """
    try:
        str(out).encode()
        out.lstat()
    except FileNotFoundError:
        return
    except UnicodeEncodeError:
        raise ExportError(f"{str(out)!a}: the name is not UTF-8; give another name") from None
    except OSError as error:
        raise ExportError(f"{out}: cannot be written: {error.strerror}; give another name") from None
    raise ExportError(f"{out}: already there; remove it or give another name")


def _require_held(loaded: LoadedModel, format: str, options: Options) -> None:
    """Refuse a model or options that a format has no place for.

    Raises:
        ExportError: says which.
    """
    require_taken(format, options)
    if options.dtype not in get_args(Dtype):
        raise ExportError(f'dtype "{options.dtype}" is none of {", ".join(get_args(Dtype))}')
    if not loaded.can_see:
        raise ExportError(f"{loaded.name} is a text-only model, not a run; train it, then export the run")
    config: Any = loaded.model.config
    kind = name_of(loaded.model.model.multi_modal_projector)
    if reason := find_format(format).code.can_hold(config.vision_config, kind, config.text_config):
        raise ExportError(reason)


def _prove(
    code: Code, loaded: LoadedModel, folder: Path, conversations: Sequence[Conversation], options: Options
) -> Proof:
    try:
        return code.prove(loaded, folder, conversations, options)
    except DianjingError:
        raise
    except Exception as error:  # whatever stops a stranger from reading it
        raise ExportError(f"the export cannot be read back, so it is not kept: {error}") from error
