"""Finds answers in texts: a pretrained encoder fine-tuned on questions in SQuAD's format.

    python experiments/question_answering.py --output runs/answers --data train-v2.0.json \
        --test dev-v2.0.json
    python experiments/question_answering.py --output runs/answers

Without files the questions are made by rule from WordNet: a text of several entries ("shuttle:
bobbin that passes the weft thread ..."), a question for the meaning of one word, and one question
in five for a word that the text does not have, whose answer is none. They are easy:
`--precision bfloat16` takes exact match on the test questions from 0.7 to 96.0, and F1 from 10.5 to
96.7, in 188 steps: 14 minutes on 2 cores that had other work.

An interrupted run is continued by the same command. The folder gets checkpoints, metrics.jsonl,
TensorBoard events, report.html and the model as a Hugging Face folder, for `fmjax answer`.
"""

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np
import tyro

import fmjax
from fmjax.data.batches import batches, shared_buckets
from fmjax.data.records import Answer, Questions, TextPairs
from fmjax.data.squad import read_squad
from fmjax.data.windows import encode_questions
from fmjax.recipes.texts import evaluation_batches, model_source
from fmjax.recipes.training import STOPPED, Training, finish, plain_numbers, train, weights_of
from fmjax.report import save_samples
from fmjax.tasks import question_answering as task
from fmjax.types import Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Training):
    """Fine-tune an encoder to answer questions."""

    model: str = "minilm"
    """A folder, a hub id, or "minilm" (all-MiniLM-L6-v2 from its package)."""
    data: str | None = None
    """A training file in SQuAD's format (1.1 or 2.0); None makes questions from WordNet."""
    val: str | None = None
    """A validation file; by default the questions on every tenth training text, by hash."""
    test: str | None = None
    """A test file."""
    made: int = 1500
    """Questions made from WordNet to train on; a tenth of it to validate and to test."""
    entries: int = 6
    """Entries of each text made from WordNet."""
    new: tuple[str, ...] = ("head/",)
    """Parameters to initialise afresh, by the start of their path."""
    max_length: int = 256
    """Tokens of a window."""
    doc_stride: int = 64
    """Tokens that a window shares with the one before it."""
    max_question_length: int = 48
    """Tokens a question is cut to."""
    max_answer_length: int = 40
    """In tokens."""
    epochs: float = 2.0
    """Passes over the training windows."""
    batch_size: int = 16
    """Windows a step, over all devices."""
    learning_rate: float = 2e-4
    """Peak of the schedule."""


def make_questions(glosses: TextPairs, count: int, entries: int, seed: int) -> Questions:
    """Questions for the meaning of a word of a text of dictionary entries; see the docstring."""
    draw = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {"ids": [], "questions": [], "contexts": [], "answers": []}
    for number in range(count):
        *chosen, other = draw.choice(len(glosses), entries + 1, replace=False)
        text, starts = "", []
        for i in chosen:
            starts.append(len(text) + len(glosses.sources[i]) + 2)
            text += f"{glosses.sources[i]}: {glosses.targets[i]}. "
        at = int(draw.integers(entries))
        absent = draw.random() < 0.2
        word = glosses.sources[other if absent else chosen[at]]
        answer = Answer(str(glosses.targets[chosen[at]]), starts[at])
        rows["ids"].append(str(number))
        rows["questions"].append(f"What does {word} mean?")
        rows["contexts"].append(text.strip())
        rows["answers"].append([] if absent else [answer])
    return Questions(**rows)


def load(settings: Settings) -> dict[str, Questions]:
    """The questions of "train", "val" and, where there are any, "test"."""
    if settings.data is None:
        from fmjax.data.wordnet import load_glosses

        made = {"train": settings.made, "val": settings.made // 10, "test": settings.made // 10}
        return {
            split: make_questions(
                load_glosses(split, lemmas="first"), count, settings.entries, settings.seed
            )
            for split, count in made.items()
        }
    questions = {"train": read_squad(settings.data)}
    if settings.val is None:
        # By text, so that none has questions on both sides.
        digests = [hashlib.sha256(text.encode()).digest() for text in questions["train"].contexts]
        held = np.array([digest[0] % 10 == 0 for digest in digests])
        if held.all() or not held.any():
            raise ValueError(f"{settings.data} has too few texts to hold some out; give val=FILE")
        questions["val"] = questions["train"].select(np.flatnonzero(held))
        questions["train"] = questions["train"].select(np.flatnonzero(~held))
    else:
        questions["val"] = read_squad(settings.val)
    if settings.test is not None:
        questions["test"] = read_squad(settings.test)
    return questions


def run(settings: Settings) -> dict[str, Any]:
    """Measures, fine-tunes (or goes on), answers; returns what results.json holds."""
    questions = load(settings)
    source = model_source(settings.model)
    model, variables = fmjax.load(
        source, head="question_answering", num_labels=2, new=settings.new, scan=settings.scan,
        remat=settings.remat, rng=jax.random.key(settings.seed),
    )  # fmt: skip
    tokenizer = fmjax.load_tokenizer(source)
    windows = {
        split: encode_questions(
            tokenizer,
            part,
            max_length=min(settings.max_length, model.config.max_position_embeddings),
            doc_stride=settings.doc_stride,
            max_question_length=settings.max_question_length,
            vocab_size=model.config.vocab_size,
        )
        for split, part in questions.items()
    }
    shapes = shared_buckets(*(part.columns for part in windows.values()))

    def evaluation(variables: Variables, split: str) -> task.Evaluation:
        return task.evaluate(
            model,
            variables,
            evaluation_batches(windows[split].columns, buckets=shapes, batch_size=32),
            windows[split],
            questions[split],
            max_answer_length=settings.max_answer_length,
        )

    measured = [split for split in ("val", "test") if split in questions]
    results: dict[str, Any] = {
        "baselines": {"before": {split: evaluation(variables, split).metrics for split in measured}}
    }
    state = train(
        settings,
        model,
        variables,
        task.loss(model),
        batches(
            windows["train"].columns,
            batch_size=settings.batch_size,
            seed=settings.seed,
            buckets=shapes,
        ),
        evaluate=lambda state: plain_numbers(evaluation(weights_of(state), "val").metrics),
        metric="f1",
        mode="max",
        about={
            "source": settings.model,
            "data": {
                "source": settings.data or "questions made from WordNet",
                "splits": {split: len(part) for split, part in questions.items()},
            },
        },
    )
    if state is None:
        return STOPPED
    results["best_step"] = int(state.step)
    for split in measured:
        found = evaluation(weights_of(state), split)
        results[split] = found.metrics
        part = questions[split]
        assert part.answers is not None
        rows = [
            (question, " | ".join(answer.text for answer in answers), prediction.text)
            for question, answers, prediction in zip(
                part.questions[:30], part.answers[:30], found.predictions[:30], strict=True
            )
        ]
        save_samples(settings.output, ("question", "answers", "found"), rows)
    finish(settings.output, results, model, weights_of(state), tokenizer)
    return results


def main(argv: list[str] | None = None) -> None:
    """Runs the experiment and prints exact match and F1 before and after fine-tuning."""
    settings = tyro.cli(Settings, description=__doc__, args=argv)
    results = run(settings)
    if results is STOPPED:
        print(f"stopped; run the same command again to continue {settings.output}")
        return
    for split in [split for split in ("val", "test") if split in results]:
        for name, scores in (("before", results["baselines"]["before"]), ("after", results)):
            numbers = plain_numbers(scores[split]).items()
            print(f"{split} {name}: " + "  ".join(f"{key} {value:.2f}" for key, value in numbers))


if __name__ == "__main__":
    main()
