"""A logistic regression on a frozen encoder's features, and what it says of new texts.

    python experiments/linear_probe.py --predict "A quiet film that stays with you."

Takes about a minute on 2 CPU cores; test accuracy on the rated movie sentences is 0.771.
"""

import dataclasses

import tyro

import fmjax
from fmjax.data import TextExamples
from fmjax.metrics.classification import classification_metrics
from fmjax.recipes.linear_probe import complete, features, fit_probe
from fmjax.recipes.texts import TextData, encode_splits, labels_of, load_splits, model_source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(TextData):
    """A linear probe on a frozen encoder."""

    model: str = "minilm"
    """A folder, a hub id, or "minilm" (all-MiniLM-L6-v2 from its package)."""
    pooling: str = "mean"
    """How tokens become one vector: mean, cls, max or pooler."""
    predict: tuple[str, ...] = ()
    """New texts to classify."""


def main(argv: list[str] | None = None) -> None:
    """Runs the experiment and prints its reports and predictions."""
    settings = tyro.cli(Settings, description=__doc__, args=argv)
    splits = load_splits(settings)
    names = splits["train"].label_names
    if settings.predict:
        splits["new"] = TextExamples(list(settings.predict), None, names)
    source = model_source(settings.model)
    model, variables = fmjax.load(source, head="model")
    tokenizer = fmjax.load_tokenizer(source)
    encoded = encode_splits(
        tokenizer, splits, max_length=settings.max_length, vocab_size=model.config.vocab_size
    )
    vectors = features(model, variables, encoded, tokenizer.pad_token_id, pooling=settings.pooling)
    labels = {split: labels_of(texts) for split, texts in splits.items() if split != "new"}
    probe = fit_probe(vectors, labels)
    for split in ("val", "test"):
        if split in splits:
            rows = complete(probe, vectors[split], len(names))
            metrics = classification_metrics(rows, labels[split], label_names=names)
            print(f"{split}: accuracy {metrics['accuracy']:.4f}\n{metrics['report_text']}")
    if settings.predict:
        rows = complete(probe, vectors["new"], len(names))
        for text, row in zip(settings.predict, rows, strict=True):
            print(f"{names[row.argmax()]}\t{row.max():.4f}\t{text}")


if __name__ == "__main__":
    main()
