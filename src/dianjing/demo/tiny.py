"""The tiny world as a demo: drawn scenes, and the two models that the package ships."""

from __future__ import annotations

from pathlib import Path

from dianjing.data.record import load_records
from dianjing.demo.world import Figure, World
from dianjing.eval.evaluate import Report
from dianjing.infer.answers import answer_questions
from dianjing.infer.generate import LoadedModel
from dianjing.infer.questions import Question, questions_of
from dianjing.model.folders import TINYWORLD
from dianjing.tinyworld.grammar import CAPTION, QUESTION_TYPES, caption_f1, read_caption
from dianjing.tinyworld.records import Sizes, write_demo_data

MAX_NEW_TOKENS = 100
"""More than the longest caption of a scene."""


def tiny_world(out: Path, sizes: Sizes) -> World:
    """Draw every scene into a demo's folder and return the world they are of."""
    data = write_demo_data(out / "data", sizes)
    captions = read_questions(data.held_out_captions)

    def accuracy(loaded: LoadedModel, path: Path) -> float:
        questions = read_questions(path)
        answers = answer_questions(loaded, questions, str(data.images), MAX_NEW_TOKENS)
        right = [answer == question.reference for answer, question in zip(answers, questions, strict=True)]
        return sum(right) / len(right)

    def objects_right(loaded: LoadedModel, _report: Report) -> float:
        said = answer_questions(loaded, captions, str(data.images), MAX_NEW_TOKENS)
        f1 = [caption_f1(text, data.scenes[one.id]) for text, one in zip(said, captions, strict=True)]
        return sum(f1) / len(f1)

    places = {"pretrain": data.pretrain, "finetune": data.finetune}
    return World(
        title="Held-out scenes of the tiny world",
        note="The scenes below were in no training data.",
        note_zh="下面的场景都没有在训练数据里出现过。",
        language_model=TINYWORLD,
        recipes={stage: f"tinyworld_{stage}" for stage in places},
        settings={stage: {"data.path": str(path)} for stage, path in places.items()},
        images=data.images,
        held_out=tuple(read_questions(data.held_out)),
        held_out_path=data.held_out,
        types=QUESTION_TYPES,
        max_new_tokens=MAX_NEW_TOKENS,
        figures=(
            Figure(
                name="accuracy_held_out_pairs",
                label="colour-shape pairs never drawn in training",
                label_zh="训练中从未出现的颜色形状组合",
                measure=lambda loaded, _report: accuracy(loaded, data.held_out_pairs),
            ),
            Figure(
                name="caption_f1",
                label="captions on request: objects right (F1)",
                label_zh="描述的准确度",
                measure=objects_right,
            ),
            Figure(
                name="captions_instead_of_answers",
                label="questions answered with a caption",
                label_zh="答非所问、只会描述",
                measure=captions_instead,
            ),
        ),
        ceiling=lambda loaded: accuracy(loaded, data.held_out_in_words),
    )


def captions_instead(_loaded: LoadedModel, report: Report) -> float:
    """Return the share of the questions that are answered with a caption of a scene."""
    instead = [bool(read_caption(one.answer)) for one in report.answers if one.question.type != CAPTION]
    return sum(instead) / len(instead)


def read_questions(path: Path) -> list[Question]:
    """Return the questions of one of the demo's files."""
    return [question for record in load_records(str(path)).records for question in questions_of(record)]
