"""Training tokenizers of the three usual kinds, saved as ordinary Hugging Face folders.

Byte-level BPE: A. Radford et al., "Language Models are Unsupervised Multitask Learners", 2019,
section 2.2. WordPiece: M. Schuster and K. Nakajima, "Japanese and Korean Voice Search", 2012, as
BERT uses it. Unigram: T. Kudo, "Subword Regularization", 2018, as T5 uses it.

The trainers of the `tokenizers` library count words in tables without an order. Its BPE does not
depend on that; of its Unigram trainer only the pieces are taken as they come, not their order. Its
WordPiece trainer gives other pieces in every run, so here WordPiece is learnt with BPE.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from fmjax.data.files import raise_problems
from fmjax.types import one_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram
    from transformers import PreTrainedTokenizerFast

Kind = Literal["bytebpe", "wordpiece", "unigram"]
TEXTS_AT_ONCE = 1000  # handed over together: the trainer takes them faster than one by one
MIN_FREQUENCY = 2  # of a pair of pieces that is merged into one
BYTES = 256
SENTINELS = 100
START = "\u2581"  # marks the start of a word, looks like a low line
CONTINUED = "##"  # marks a piece that does not start a word, in WordPiece

# By kind: the role of each special token, in the order of their ids from 0.
SPECIAL_TOKENS: dict[str, dict[str, str]] = {
    "bytebpe": {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"},
    "wordpiece": {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
    "unigram": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
}


def train_tokenizer(
    texts: Iterable[str],
    *,
    kind: Kind,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    sentinels: int | None = None,
    lowercase: bool = False,
    max_length: int | None = None,
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer on texts, which are read once and not kept.

    The same texts give the same tokenizer. It is written with ``save_pretrained(folder)`` and read
    by ``AutoTokenizer.from_pretrained(folder)``.

    Args:
      texts: the corpus, one document or line at a time.
      kind: "bytebpe", as GPT-2 has it: any text at all can be written and comes back exactly;
        no special tokens are added to a text, and <|endoftext|> begins and ends documents.
        "wordpiece", as BERT has it: [CLS] text [SEP] and [CLS] text [SEP] pair [SEP].
        "unigram", as T5 has it: text </s>, with the sentinels of span corruption.
        Learning it takes by far the longest.
      vocab_size: of the tokenizer with all special tokens and sentinels, at most: a small corpus
        may not have so many pieces.
      special_tokens: further ones, which are never split, with the ids after those of the kind.
      sentinels: for "unigram", how many tokens <extra_id_0>, <extra_id_1>, ... there are, 100 by
        default; they have the last ids, in falling order, as in T5.
      lowercase: take all texts in lower case; "wordpiece" then also drops accents.
      max_length: tokens that the model takes, the default of the tokenizer's truncation.

    Raises:
      ValueError: an unknown kind, special tokens that clash, a vocab_size below the special tokens
        and the characters of the texts, a text that is no string, or no text at all.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    if kind not in SPECIAL_TOKENS:
        raise ValueError(f"kind {kind!r} is not one of {sorted(SPECIAL_TOKENS)}")
    if sentinels is not None and kind != "unigram":
        raise ValueError(f"sentinels={sentinels} with kind={kind!r}: only 'unigram' has some")
    count = SENTINELS if sentinels is None else sentinels
    extra = [f"<extra_id_{n}>" for n in range(count)] if kind == "unigram" else []
    roles = SPECIAL_TOKENS[kind]
    special = [*roles.values(), *special_tokens]
    problems = one_text("texts", texts) + [
        f"special token {token!r} is given twice" if token.strip() else "a special token is empty"
        for n, token in enumerate(special)
        if not token.strip() or token in special[:n] or token in extra
    ]
    if count < 0:
        problems.append(f"sentinels={count} is negative")
    raise_problems("train_tokenizer", problems)
    size = vocab_size - len(extra)  # without what is added at the end
    reserved = len(special)
    _check_size(vocab_size, reserved + len(extra), BYTES if kind == "bytebpe" else 1, kind)

    forms: set[str] = set()  # the characters, and those with CONTINUED in front
    learner = _learner(kind, lowercase)
    trainer = _trainer(kind, size, special)
    learner.train_from_iterator(
        _checked(texts, learner, forms, vocab_size, reserved + len(extra), kind), trainer
    )
    if kind == "bytebpe":
        tokenizer = learner
        roles = {"bos_token": roles["eos_token"], **roles}
    elif kind == "wordpiece":
        tokenizer = _wordpiece(learner, size, special, forms, lowercase)
    else:
        tokenizer = learner
        tokenizer.model = _unigram(learner, special)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in reversed(extra)])
    _finish(tokenizer, kind)
    names = ["input_ids", *(["token_type_ids"] if kind == "wordpiece" else []), "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens=[*special_tokens, *extra],
        model_input_names=names,
        clean_up_tokenization_spaces=False,
        **roles,
        **({} if max_length is None else {"model_max_length": max_length}),
    )


def _check_size(vocab_size: int, reserved: int, alphabet: int, kind: str) -> None:
    if vocab_size < reserved + alphabet:
        unit = "bytes" if kind == "bytebpe" else "characters"
        fix = "" if kind == "bytebpe" else f"; kind='bytebpe' needs {BYTES} whatever the texts"
        raise ValueError(
            f"vocab_size={vocab_size} has no room for {reserved} special tokens and {alphabet} "
            f"{unit}: {reserved + alphabet} at least, and as many more as pieces are to be learnt"
            f"{fix}"
        )


def _checked(
    texts: Iterable[str],
    learner: Tokenizer,
    forms: set[str],
    vocab_size: int,
    reserved: int,
    kind: str,
) -> Iterator[list[str]]:
    """The texts in lists; adds to `forms` and, after the last text, checks what was seen."""
    # Taken before the first text: while it trains, the learner is locked, and asking it for
    # anything would wait forever.
    normalizer, splitter = learner.normalizer, learner.pre_tokenizer
    seen = False

    def batches() -> Iterator[list[str]]:
        nonlocal seen
        numbered = enumerate(texts)
        while part := list(itertools.islice(numbered, TEXTS_AT_ONCE)):
            for number, text in part:
                if not isinstance(text, str):
                    raise ValueError(f"text {number} is {text!r}, a string was expected")
                seen = seen or bool(text.strip())
                if kind == "bytebpe":
                    continue
                normal = text if normalizer is None else normalizer.normalize_str(text)
                for word, _ in splitter.pre_tokenize_str(normal):
                    if kind == "unigram":
                        forms.update(word)
                    else:
                        forms.add(word[1:2])
                        forms.update(CONTINUED + character for character in word[2:])
            yield [text for _, text in part]
        forms.discard("")
        if not seen:
            raise ValueError("there is no text to train a tokenizer on")
        if kind != "bytebpe":
            _check_size(vocab_size, reserved, len(forms), kind)

    return batches()


def _learner(kind: str, lowercase: bool) -> Tokenizer:
    """What the trainer trains: for "wordpiece" a BPE with START in front of every word."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    if kind == "bytebpe":
        tokenizer = Tokenizer(models.BPE())
        if lowercase:
            tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.BertNormalizer(lowercase=lowercase), normalizers.Replace(START, " ")]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Metaspace(prepend_scheme="always")]
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        steps = [normalizers.NFKC(), *([normalizers.Lowercase()] if lowercase else [])]
        tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
        )
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer


def _trainer(kind: str, size: int, special: list[str]):
    from tokenizers import pre_tokenizers, trainers

    if kind == "unigram":
        return trainers.UnigramTrainer(
            vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    if kind == "wordpiece":
        # More pieces than are wanted: some are the first character of a word with its START, and
        # they are taken in the order in which they were learnt.
        return trainers.BpeTrainer(
            vocab_size=2 * size, min_frequency=MIN_FREQUENCY, show_progress=False
        )
    return trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )


def _wordpiece(
    learner: Tokenizer, size: int, special: list[str], forms: set[str], lowercase: bool
) -> Tokenizer:
    """A WordPiece tokenizer with the special tokens, all characters and the pieces learnt first."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    learnt = learner.get_vocab()
    pieces = dict.fromkeys([*special, *sorted(forms)])  # a set in order
    for piece in sorted(learnt, key=lambda piece: learnt[piece]):
        if len(pieces) >= size:
            break
        word = piece.removeprefix(START)
        if len(piece) > 1 and word:
            pieces.setdefault(word if word != piece else CONTINUED + piece)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUED)
    return tokenizer


def _unigram(learner: Tokenizer, special: list[str]) -> Unigram:
    """The learnt model with the special tokens first and then the likeliest pieces."""
    from tokenizers import models

    # The last digits depend on the order of summation.
    learnt = {
        piece: round(score, 6)
        for piece, score in json.loads(learner.to_str())["model"]["vocab"]
        if piece not in special
    }
    # Characters that were pruned come back with the lowest score, each 0.0001 above the one before,
    # in no order of their own: here in that of the characters.
    lowest = min(learnt.values())
    characters = sorted(piece for piece in learnt if len(piece) == 1)
    ladder = {round(lowest + 0.0001 * step, 6) for step in range(len(characters))}
    rare = [character for character in characters if learnt[character] in ladder]
    scores = sorted(learnt[piece] for piece in rare)
    learnt |= dict(zip(rare, scores, strict=True))
    ordered = sorted(learnt.items(), key=lambda item: (-item[1], item[0]))
    vocabulary = [*((token, 0.0) for token in special), *ordered]
    return models.Unigram(vocabulary, special.index("<unk>"))


def _finish(tokenizer: Tokenizer, kind: str) -> None:
    """Which special tokens surround one text and two."""
    from tokenizers import processors

    if kind == "bytebpe":
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        return
    single, pair, tokens = {
        "wordpiece": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ("[CLS]", "[SEP]")),
        "unigram": ("$A </s>", "$A </s> $B </s>", ("</s>",)),
    }[kind]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in tokens],
    )
