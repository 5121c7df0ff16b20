"""A tokenizer and a small BERT from scratch (masked words, next sentences), and what it is worth.

    python experiments/pretrain_bert.py --output runs/bert --precision bfloat16

Sixteen passes over Brown, 64 minutes of CPU. The model guesses 0.302 of the masked test tokens (it
knows little but which are frequent, 0.12, for the first 900 of 5,204 steps) and which sentences
follow each other in 0.752 of the test pairs. Its tagger has a test accuracy of 0.905, the one from
random weights 0.792.

Afterwards the encoder is fine-tuned to tag parts of speech with few labelled sentences, beside the
same network from random weights. Any other text (a sentence a line, empty lines between documents)
and tags:

    python experiments/pretrain_bert.py --output runs/mine --data train.txt --val val.txt \
        --test test.txt --tagged train.conll --tagged-val val.conll --tagged-test test.conll

An interrupted run is continued by the same command. Pretraining is in the folder itself, with its
report; the two taggers are in tagged-pretrained/ and tagged-random/.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pos_tagging
import tyro
from corpora import Corpus, load_corpus

import fmjax
from fmjax.config import write_json
from fmjax.data.batches import batches, shared_buckets
from fmjax.data.pairs import encode_sentences, next_sentence_pairs
from fmjax.data.tokenizer import train_tokenizer
from fmjax.models import bert
from fmjax.recipes.texts import evaluation_batches
from fmjax.recipes.training import (
    STOPPED,
    Optimizer,
    Schedule,
    Training,
    plain_numbers,
    train,
    weights_of,
)
from fmjax.report import write_report
from fmjax.tasks import masked_lm as task
from fmjax.tasks.masking import Masking
from fmjax.types import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Corpus, Training):
    """Pretrain a small BERT."""

    vocab_size: int = 6000
    """Of the tokenizer, at most."""
    layers: int = 4
    """Blocks."""
    width: int = 256
    """Of the hidden states; heads have 64."""
    max_length: int = 64
    """Tokens of a pair of segments, and positions of the model."""
    mask_rate: float = 0.4
    """Share of the tokens that is to be guessed: the more, the more a step teaches (Wettig et al.
    2023, arXiv:2202.08005, who find 0.4 best for large models)."""
    whole_words: bool = False
    """Mask words, not tokens."""
    dropout: float = 0.0
    """Share of hidden states and attention that is dropped: nothing is learnt by heart in a short
    pretraining (so Geiping & Goldstein 2022, arXiv:2212.14034)."""
    copies: int = 16
    """Times the corpus is cut into pairs, each time otherwise; an epoch is all of them."""
    epochs: float = 1.0
    """Passes over the pairs."""
    batch_size: int = 64
    """Pairs a step, over all devices."""
    optimizer: Optimizer = "muon"
    """Muon learns from fewer tokens."""
    learning_rate: float = 1e-3
    """Peak of the schedule."""
    schedule: Schedule = "stable"
    """Of the learning rate: most is learnt once the model has begun to look at its context."""
    evaluations: float = 8.0
    """Evaluations an epoch; each may set the best checkpoint."""
    tagged: str = "brown"
    """Sentences to fine-tune on: the Brown corpus, or a file in columns."""
    tagged_val: str | None = None
    """Validation sentences, when `tagged` is a file."""
    tagged_test: str | None = None
    """Test sentences, when `tagged` is a file."""
    tagged_sentences: int = 2000
    """How many of them are used to train."""
    tagged_epochs: float = 4.0
    """Passes over them."""
    tagged_learning_rate: float = 5e-4
    """Peak of fine-tuning."""


def sentences_of(settings: Settings) -> dict[str, list[list[str]]]:
    """Documents as lists of sentences, by split."""
    if settings.data != "brown":
        corpus = load_corpus(settings)
        return {split: [text.split("\n") for text in part.texts] for split, part in corpus.items()}
    from fmjax.data.brown import load_brown_genres

    splits = {}
    for split in ("train", "val", "test"):
        examples = load_brown_genres(split, unit="sentence")
        documents: dict[str, list[str]] = {}
        for name, text in zip(examples.ids or (), examples.texts, strict=True):
            documents.setdefault(name.partition("/")[0], []).append(text)
        splits[split] = list(documents.values())
    return splits


def pretrain(settings: Settings, folder: Path, untrained: Path) -> dict[str, Any]:
    """Trains (or goes on) and saves the encoder, and the network before training."""
    documents = sentences_of(settings)
    tokenizer: Any = train_tokenizer(
        (text for document in documents["train"] for text in document),
        kind="wordpiece",
        vocab_size=settings.vocab_size,
        lowercase=True,
        max_length=settings.max_length,
    )
    config = bert.Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=max(1, settings.width // 64),
        intermediate_size=4 * settings.width,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.dropout,
        max_position_embeddings=settings.max_length,
        pad_token_id=tokenizer.pad_token_id,
    )
    model, variables = fmjax.create(
        "bert", config, head="pretraining", rng=jax.random.key(settings.seed),
        scan=settings.scan, remat=settings.remat,
    )  # fmt: skip
    fmjax.save(untrained, model, variables, tokenizer)
    pairs = {
        split: next_sentence_pairs(
            encode_sentences(tokenizer, part, vocab_size=len(tokenizer)),
            max_length=settings.max_length,
            seed=settings.seed,
            copies=settings.copies if split == "train" else 1,
        )
        for split, part in documents.items()
    }
    shapes = shared_buckets(*pairs.values())
    masking = Masking(
        mask_token_id=tokenizer.mask_token_id,
        vocab_size=len(tokenizer),
        special_ids=tuple(tokenizer.all_special_ids),
        probability=settings.mask_rate,
        whole_words=settings.whole_words,
    )
    stream = batches(
        pairs["train"], batch_size=settings.batch_size, seed=settings.seed, buckets=shapes
    )

    def evaluate(state: TrainState, split: str = "val") -> dict[str, float]:
        once = evaluation_batches(pairs[split], buckets=shapes, batch_size=settings.batch_size)
        return task.evaluate(model, weights_of(state), once, masking=masking)

    state = train(
        settings,
        model,
        variables,
        task.loss(model, masking=masking),
        stream,
        evaluate=evaluate,
        metric="loss",
        mode="min",
        about={
            "source": f"bert of {settings.layers} layers and width {settings.width}, from scratch",
            "data": {
                "source": settings.data,
                "splits": {split: len(part) for split, part in pairs.items()},
            },
        },
    )
    if state is None:
        return STOPPED
    results: dict[str, Any] = {"best_step": int(state.step)}
    results |= {split: evaluate(state, split) for split in ("val", "test")}
    fmjax.save(folder, model, weights_of(state), tokenizer)
    return results


def run(settings: Settings) -> dict[str, Any]:
    """Pretrains, fine-tunes twice, and returns what results.json holds."""
    folders = {name: settings.output / name for name in ("export", "untrained")}
    results = pretrain(settings, folders["export"], folders["untrained"])
    if results is STOPPED:
        return results
    results["tagging"] = {}
    for name, folder in (("pretrained", folders["export"]), ("random", folders["untrained"])):
        tagger = pos_tagging.Settings(
            output=settings.output / f"tagged-{name}",
            model=str(folder),
            data=settings.tagged,
            val=settings.tagged_val,
            test=settings.tagged_test,
            train_sentences=settings.tagged_sentences,
            epochs=settings.tagged_epochs,
            learning_rate=settings.tagged_learning_rate,
            max_length=settings.max_length,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        tagged = pos_tagging.run(tagger)
        if tagged is pos_tagging.STOPPED:
            return STOPPED
        results["tagging"][name] = {
            split: plain_numbers(tagged[split]) for split in ("val", "test")
        }
    write_json(settings.output / "results.json", results)
    write_report(settings.output)
    return results


def main(argv: list[str] | None = None) -> None:
    """Runs the experiment and prints the scores of pretraining and of the two taggers."""
    settings = tyro.cli(Settings, description=__doc__, args=argv)
    results = run(settings)
    if results is STOPPED:
        print(f"stopped; run the same command again to continue {settings.output}")
        return
    scores = "  ".join(f"{name} {value:.4f}" for name, value in results["test"].items())
    print(f"pretraining, test: {scores}")
    for name, tagged in results["tagging"].items():
        print(f"tagging from {name} weights, test accuracy: {tagged['test']['accuracy']:.4f}")


if __name__ == "__main__":
    main()
