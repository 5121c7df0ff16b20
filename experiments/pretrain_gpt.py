"""A tokenizer and a small GPT-2 from scratch, against a byte n-gram model of the same text.

    python experiments/pretrain_gpt.py --output runs/gpt

Test bits per byte of Brown: 1.821, the byte 6-gram model has 2.086; with `--precision bfloat16` in
68 minutes on 2 CPU cores that had other work. (After a quarter of a pass, validation bits are 2.34
with Muon, and 2.43 at best with AdamW.)
Documents are split whole. Both sides are measured in bits per byte of held-out text; tokens that
nothing predicts (the first of each row) are charged as if drawn uniformly from the vocabulary. Any
other text, with empty lines between documents:

    python experiments/pretrain_gpt.py --output runs/mine --data train.txt --val val.txt \
        --test test.txt

An interrupted run is continued by the same command. The folder gets checkpoints, metrics.jsonl,
TensorBoard events, report.html and the model as a Hugging Face folder, for `fmjax generate`.
"""

import dataclasses
import math
from typing import Any

import jax
import tyro
from corpora import Corpus, load_corpus

import fmjax
from fmjax.data.language import TokenDocuments, encode_documents, language_batches
from fmjax.data.records import Documents
from fmjax.data.tokenizer import train_tokenizer
from fmjax.metrics.byte_ngram import fit_ngram
from fmjax.metrics.language_modelling import bits_per_byte
from fmjax.models import gpt2
from fmjax.recipes.training import STOPPED, Optimizer, Training, finish, train, weights_of
from fmjax.report import save_samples
from fmjax.tasks import causal_lm as task
from fmjax.types import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Corpus, Training):
    """Pretrain a small GPT-2."""

    vocab_size: int = 4096
    """Of the tokenizer, at most."""
    layers: int = 4
    """Blocks."""
    width: int = 256
    """Of the hidden states; heads have 64."""
    length: int = 128
    """Tokens of a row, and positions of the model."""
    dropout: float = 0.0
    """Everywhere."""
    epochs: float = 3.0
    """Passes over the training text."""
    batch_size: int = 8
    """Rows a step, over all devices."""
    optimizer: Optimizer = "muon"
    """Muon learns from fewer tokens, at more computation a step."""
    learning_rate: float = 2e-3
    """Peak of the schedule."""
    weight_decay: float = 0.1
    """Of kernels and embeddings."""
    warmup: float = 0.05
    """Share of the steps that warm up."""
    evaluations: float = 1.0
    """Evaluations an epoch; each may set the best checkpoint."""
    ngram: int = 6
    """Bytes of the baseline's n-grams."""
    sample_tokens: int = 64
    """New tokens of each printed sample."""


def encode(tokenizer: Any, documents: Documents, vocab_size: int) -> TokenDocuments:
    """Documents that begin with the end token, so that their first word is predicted too."""
    return encode_documents(
        tokenizer,
        documents.texts,
        vocab_size=vocab_size,
        bos_id=tokenizer.eos_token_id,
        end=False,
    )


def all_nats(nll: float, predicted: float, documents: TokenDocuments, vocab: int) -> float:
    """Nats of all tokens; each that nothing predicts costs the logarithm of the vocabulary."""
    others = len(documents.tokens) - len(documents) - predicted  # each document's first is given
    return nll * predicted + others * math.log(vocab)


def run(settings: Settings) -> dict[str, Any]:
    """Trains (or goes on), evaluates, draws samples, and returns what results.json holds."""
    corpus = load_corpus(settings)
    tokenizer: Any = train_tokenizer(
        corpus["train"].texts,
        kind="bytebpe",
        vocab_size=settings.vocab_size,
        max_length=settings.length,
    )
    config = gpt2.Config(
        vocab_size=len(tokenizer),
        n_positions=settings.length,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=max(1, settings.width // 64),
        resid_pdrop=settings.dropout,
        embd_pdrop=settings.dropout,
        attn_pdrop=settings.dropout,
    )
    model, variables = fmjax.create(
        "gpt2", config, head="causal_lm", rng=jax.random.key(settings.seed),
        scan=settings.scan, remat=settings.remat,
    )  # fmt: skip
    encoded = {split: encode(tokenizer, part, len(tokenizer)) for split, part in corpus.items()}
    rows: dict[str, Any] = {"length": settings.length, "batch_size": settings.batch_size}
    pad_id = tokenizer.eos_token_id
    stream = language_batches(encoded["train"], **rows, pad_id=pad_id, seed=settings.seed)

    def evaluate(state: TrainState, split: str = "val") -> dict[str, float]:
        once = language_batches(encoded[split], **rows, pad_id=pad_id, shuffle=False, epochs=1)
        scores = task.evaluate(model, weights_of(state), once)
        nats = all_nats(scores["nll"], scores["tokens"], encoded[split], len(tokenizer))
        return {"bits_per_byte": bits_per_byte(nats, encoded[split].num_bytes), **scores}

    state = train(
        settings,
        model,
        variables,
        task.loss(model),
        stream,
        evaluate=evaluate,
        metric="bits_per_byte",
        mode="min",
        about={
            "source": f"gpt2 of {settings.layers} layers and width {settings.width}, from scratch",
            "data": {
                "source": settings.data,
                "splits": {split: len(part) for split, part in corpus.items()},
            },
        },
    )
    if state is None:
        return STOPPED
    texts = {split: "\n\n".join(part.texts).encode() for split, part in corpus.items()}
    baseline = fit_ngram(texts["train"], settings.ngram)
    results: dict[str, Any] = {"best_step": int(state.step)}
    rivals: dict[str, Any] = {}
    for split in ("val", "test"):
        results[split] = evaluate(state, split)
        nats = float(baseline.nats(texts[split]).sum())
        rivals[split] = {"bits_per_byte": bits_per_byte(nats, len(texts[split]))}
    results["baselines"] = {f"byte {settings.ngram}-gram": rivals}
    variables = weights_of(state)
    results["samples"] = samples(settings, model, variables, tokenizer, corpus["test"])
    finish(settings.output, results, model, variables, tokenizer)
    return results


def samples(
    settings: Settings, model: Any, variables: Any, tokenizer: Any, documents: Documents
) -> list[str]:
    """Continuations of the first words of held-out documents, kept in the run's folder."""
    starts = [tokenizer(text)["input_ids"][:8] for text in documents.texts]
    starts = [start for start in starts if len(start) == 8][:4]
    prompts = [[tokenizer.eos_token_id, *start] for start in starts]
    out = fmjax.generate(
        model, variables, prompts, max_new_tokens=min(settings.sample_tokens, settings.length - 9),
        do_sample=True, temperature=0.8, top_p=0.95, rng=jax.random.key(settings.seed),
    )  # fmt: skip
    texts = [tokenizer.decode(row[:n]) for row, n in zip(out.tokens, out.lengths, strict=True)]
    save_samples(
        settings.output,
        ("beginning", "continuation"),
        list(zip([tokenizer.decode(start) for start in starts], texts, strict=True)),
    )
    return [tokenizer.decode(start) + text for start, text in zip(starts, texts, strict=True)]


def main(argv: list[str] | None = None) -> None:
    """Runs the experiment and prints its scores beside the baseline's, and samples."""
    settings = tyro.cli(Settings, description=__doc__, args=argv)
    results = run(settings)
    if results is STOPPED:
        print(f"stopped; run the same command again to continue {settings.output}")
        return
    for split in ("val", "test"):
        ours = results[split]["bits_per_byte"]
        (name, theirs), *_ = results["baselines"].items()
        print(f"{split} bits per byte: {ours:.4f}, {name} {theirs[split]['bits_per_byte']:.4f}")
    for text in results["samples"]:
        print(f"---\n{text}")


if __name__ == "__main__":
    main()
