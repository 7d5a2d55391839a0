"""LoadedModel -> a folder that AutoModelForImageTextToText and AutoProcessor of transformers 4.57 and 5.x read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, LlavaConfig
from transformers.utils.import_utils import is_torchvision_available

from dianjing.constants import IMAGE_MARKER, TEMPLATE_KEY
from dianjing.data.record import with_markers, without_markers
from dianjing.errors import ExportError
from dianjing.export.chat_template import jinja
from dianjing.export.files import DTYPES, save_weights, write_json
from dianjing.export.formats import Options
from dianjing.export.layout import EMBEDDING, HEAD, hub_config, hub_state, not_held, preprocessor_config, with_image_row
from dianjing.export.merge import merged_state
from dianjing.export.receipt import (
    ANSWER_TOKENS,
    Case,
    Proof,
    logit_difference,
    pixel_difference,
    run_forms,
)
from dianjing.export.tokenizer import save_tokenizer
from dianjing.formats.weights import name_some
from dianjing.infer.generate import Conversation, LoadedModel, generate_ids, prepare, stop_sequences
from dianjing.model.towers.families import tower_family

COMPARED = "stock transformers reading the folder (AutoModelForImageTextToText, AutoProcessor) against the run"
SCALED = ("gemma", "gemma2")
"""LLMs before which older readers scale picture features as if they were words."""
LOADING = """\
```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # this folder
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
image = Image.new("RGB", (80, 60), "red")  # your picture
question = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
text = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
inputs = processor(text=text, images=[image], return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""


def can_hold(tower: Any, projector: str, llm: Any) -> str | None:
    """Return why transformers' LLaVA cannot hold a tower or a projector."""
    return not_held("hf", tower, projector)


def save(loaded: LoadedModel, folder: Path, options: Options) -> None:
    """Write weights (adapters merged), configuration, tokenizer and processor into an existing folder.

    Raises:
        ExportError: its tokenizer cannot be written, or `dtype` cannot hold its weights.
    """
    tokenizer, encoder = loaded.tokenizer, loaded.encoder
    config: Any = loaded.model.config
    weights = hub_state(_merged(loaded), DTYPES[options.dtype], tower_family(config.vision_config))
    save_weights(weights, folder)

    chat_template = jinja(encoder.template, str(tokenizer.bos_token or ""), str(tokenizer.eos_token or ""))
    max_length = config.text_config.max_position_embeddings
    save_tokenizer(tokenizer, encoder, chat_template, max_length, folder)
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")

    written = hub_config(
        config,
        vocab_size=weights[EMBEDDING].shape[0],
        tied=HEAD not in weights,
        image_token_id=encoder.image_token_id,
        dtype=DTYPES[options.dtype],
    )
    write_json(folder / "config.json", written | {TEMPLATE_KEY: encoder.template.name})
    write_json(folder / "generation_config.json", _generation_config(loaded))
    write_json(folder / "preprocessor_config.json", preprocessor_config(loaded.processor))
    write_json(folder / "processor_config.json", _processor_config(config))


def _merged(loaded: LoadedModel) -> dict[str, Tensor]:
    """Return what the export holds before it is rounded: fp32 weights under their live names."""
    tokenizer, encoder = loaded.tokenizer, loaded.encoder
    stand_in: Any = next((i for i in (tokenizer.bos_token_id, tokenizer.unk_token_id) if i is not None), 0)
    return with_image_row(merged_state(loaded.model), encoder.image_token_id, stand_in)


@torch.no_grad()
def prove(loaded: LoadedModel, folder: Path, conversations: Sequence[Conversation], options: Options) -> Proof:
    """Return how the model in `folder`, read as a stranger would read it, answers compared with the run.

    Fewer bits than fp32 change the logits by more than a fault might. So the weights read back must be the run's,
    rounded, bit for bit; then the unrounded ones take their place and must give the run's logits. What the
    rounding itself costs is measured, computing in fp32, and reported.

    Raises:
        ExportError: a weight is not what was to be written.
    """
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    model = model.to(loaded.model.device).eval()
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    torchvision = processor.image_processor
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    inputs = [_inputs(processor, conversation, model.device) for conversation in conversations]
    answers = generate_ids(loaded, conversations, ANSWER_TOKENS)
    merged = _merged(loaded)
    _require_weights(model, merged, DTYPES[options.dtype])
    rounded = []
    if options.dtype != "fp32":
        rounded = [(_logits(model, *asked), _answer(model, asked[0])) for asked in zip(inputs, answers, strict=True)]
        model.load_state_dict(merged)
    del merged
    cases = []
    for number, (conversation, answer) in enumerate(zip(conversations, answers, strict=True)):
        asked = inputs[number]
        ours, theirs = run_forms(loaded, conversation, answer), _logits(model, asked, answer)
        case = Case(
            question=conversation.question,
            image_sizes=[image.size for image in conversation.images],
            same_ids=asked["input_ids"][0].tolist() == prepare(loaded, conversation).input_ids,
            pixel_difference=pixel_difference(loaded, conversation, asked.get("pixel_values")),
            logit_difference=max(logit_difference(one, theirs) for one in ours),
            largest_logit=ours[0].abs().max().item(),
            same_answer=_answer(model, asked) == answer,
        )
        if rounded:
            logits, said = rounded[number]
            difference = logit_difference(ours[0], logits)
            case = replace(case, rounding_difference=difference, rounded_same_answer=said == answer)
        cases.append(case)
    notes = _notes(cases, options.dtype)
    if is_torchvision_available():
        processor.image_processor = torchvision
        apart = max(
            pixel_difference(loaded, one, _inputs(processor, one, model.device).get("pixel_values"))
            for one in conversations
        )
        notes += (
            f"compared with transformers' image processor on Pillow; the one on torchvision, which it prefers where "
            f"installed, rounds otherwise: pixel values differ by up to {apart:.2g} "
            '(AutoImageProcessor.from_pretrained(folder, backend="pil") gives those of training)',
        )
    if cast(Any, loaded.model.config.text_config).model_type in SCALED:
        notes += ("transformers 4 multiplies picture features before a Gemma by sqrt(hidden_size): read it with 5",)
    return Proof(cases=cases, compared=COMPARED, notes=notes)


def _notes(cases: Sequence[Case], dtype: str) -> tuple[str, ...]:
    exact = "every tensor read back is the run's merged weight, bit for bit"
    if dtype == "fp32":
        return (exact,)
    same = sum(bool(case.rounded_same_answer) for case in cases)
    cost = max(case.rounding_difference or 0.0 for case in cases)
    return (
        f"{exact}, rounded to {dtype}; logit_difference is with the unrounded weights in their place",
        f"rounding to {dtype} moves the logits by up to {cost:.1e}, computed in fp32; {same} of {len(cases)} greedy "
        f"answers of at most {ANSWER_TOKENS} tokens stay the same",
    )


def _require_weights(model: Any, merged: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Refuse a model whose weights are not the merged ones, rounded.

    Raises:
        ExportError: it has others.
    """
    read = model.state_dict()
    wrong = read.keys() ^ merged.keys()
    wrong |= {name for name in read.keys() & merged.keys() if not _is_rounding(read[name], merged[name], dtype)}
    if wrong:
        raise ExportError(f"the export is not kept: read back, {name_some(wrong)} are not the weights of the run")


def _is_rounding(read: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    return read.shape == weight.shape and torch.equal(read, weight.to(dtype).float())


def _inputs(processor: Any, conversation: Conversation, device: torch.device) -> Any:
    text = processor.apply_chat_template(_messages(conversation), add_generation_prompt=True)
    return processor(text=text, images=list(conversation.images) or None, return_tensors="pt").to(device)


def _processor_config(config: LlavaConfig) -> dict[str, Any]:
    strategy = config.vision_feature_select_strategy
    return {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_MARKER,
        "patch_size": cast(Any, config.vision_config).patch_size,
        # CLIP's class token, which "default" leaves out again.
        "num_additional_image_tokens": tower_family(config.vision_config).extra_tokens(config.vision_config),
        "vision_feature_select_strategy": strategy,
    }


def _messages(conversation: Conversation) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for question, answer in conversation.history:
        messages += [_message(question), {"role": "assistant", "content": answer}]
    return [*messages, _message(conversation.question)]


def _message(question: str) -> dict[str, Any]:
    """Return the user's message; pictures as content parts where that says the same as the text."""
    count, text = question.count(IMAGE_MARKER), without_markers(question)
    if not count or question != with_markers(text, count):
        return {"role": "user", "content": question}
    parts: list[dict[str, Any]] = [*[{"type": "image"}] * count, *([{"type": "text", "text": text}] if text else [])]
    return {"role": "user", "content": parts}


def _logits(model: Any, inputs: Any, answer: list[int]) -> Float[Tensor, "tokens vocab"]:
    tail = torch.tensor([answer[:-1]], device=model.device).long()
    ids = torch.cat([inputs["input_ids"], tail], 1)
    return model(input_ids=ids, pixel_values=inputs.get("pixel_values"), use_cache=False).logits[0].float()


def _answer(model: Any, inputs: Any) -> list[int]:
    written = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return written[0, inputs["input_ids"].shape[1] :].tolist()


def _generation_config(loaded: LoadedModel) -> dict[str, Any]:
    tokenizer = loaded.tokenizer
    values = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": sorted(stop[0] for stop in stop_sequences(loaded) if len(stop) == 1),
        "pad_token_id": next(
            (i for i in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id) if i is not None),
            None,
        ),
    }
    return {name: value for name, value in values.items() if value is not None}
