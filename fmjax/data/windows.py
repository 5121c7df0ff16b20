"""Long texts as overlapping windows: contexts that hold an answer, documents to be scored."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from fmjax.data.columns import IGNORED_LABEL, Columns, Ragged
from fmjax.data.files import raise_problems
from fmjax.data.language import TokenDocuments
from fmjax.data.records import Questions
from fmjax.data.tokens import check_vocabulary, fast_encodings, padding_id, parts

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

OUTSIDE = -1
"""The offset of tokens that are not of a context."""


@dataclasses.dataclass(frozen=True, eq=False)
class QuestionWindows:
    """N questions as W windows on their contexts.

    Attributes:
      columns: W examples: ``input_ids``, ``token_type_ids`` if the tokenizer makes them and, if
        answers are known, ``start_positions`` and ``end_positions`` int32 [W]: the first and the
        last token of the answer, both the class token's where the window does not hold it.
      question: int64 [W], the question that each window is of, in increasing order.
      offsets: int32 [total, 2], for every token of the columns the characters of the context that
        it covers, from and up to; -1 where it is not of the context.
      cls: int64 [W], the place of the class token; 0 where the tokenizer has none.
      lost: questions whose answer no window holds as a whole.
    """

    columns: Columns
    question: np.ndarray
    offsets: np.ndarray
    cls: np.ndarray
    lost: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.columns)

    def offsets_of(self, window: int) -> np.ndarray:
        """int32 [T, 2] of one window's tokens."""
        bounds = self.columns.ragged[0].offsets
        return self.offsets[bounds[window] : bounds[window + 1]]

    def answer(self, window: int, start: int, end: int, context: str) -> str:
        """The text from one token to another, both included; "" where one is not of the context.

        Args:
          window: its number.
          start, end: places in it, as a model predicts them.
          context: of the window's question.
        """
        spans = self.offsets_of(window)
        if end < start or max(start, end) >= len(spans) or OUTSIDE in spans[[start, end], 0]:
            return ""
        return context[spans[start, 0] : spans[end, 1]]


def encode_questions(
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    *,
    max_length: int = 384,
    doc_stride: int = 128,
    max_question_length: int = 64,
    vocab_size: int | None = None,
) -> QuestionWindows:
    """Tokenizes each question with as many windows of its context as are needed to see all of it.

    Devlin et al. 2019, arXiv:1810.04805, section 4.2. Of several answers to one question the first
    is what is learnt.

    Args:
      tokenizer: a fast one of `transformers`.
      questions: N, of which those with an empty list of answers have none.
      max_length: of a window, in tokens, question and special tokens included.
      doc_stride: tokens of the context that a window shares with the one before it.
      max_question_length: tokens that a question is cut to.
      vocab_size: of the model that is to read them.

    Raises:
      ValueError: lengths that leave no room, empty questions or contexts, every answer that is not
        in its context where it says it is, or token ids outside the model's vocabulary.
    """
    special = tokenizer.num_special_tokens_to_add(pair=True)
    problems = [
        f"{name}={value} must be at least {least}"
        for name, value, least in [
            ("doc_stride", doc_stride, 0),
            ("max_question_length", max_question_length, 1),
        ]
        if value < least
    ]
    room = max_length - special - max_question_length
    if room <= doc_stride:
        problems.append(
            f"max_length={max_length} leaves {room} tokens for a context beside {special} special "
            f"tokens and max_question_length={max_question_length}; it must be more than "
            f"doc_stride={doc_stride}"
        )
    problems += [
        f"question {questions.ids[n]!r} has an empty {name}"
        for name, texts in (("text", questions.questions), ("context", questions.contexts))
        for n, text in enumerate(texts)
        if not text.strip()
    ]
    spans = _answer_spans(questions, problems)
    raise_problems("encode_questions", problems)

    rows: dict[str, list[np.ndarray]] = {"input_ids": []}
    offsets, owner, cls, positions = [], [], [], []
    for part in parts(len(questions)):
        asked = _cut(tokenizer, list(questions.questions[part]), max_question_length)
        encoding = tokenizer(
            asked,
            list(questions.contexts[part]),
            truncation="only_second",
            max_length=max_length,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_attention_mask=False,
            padding=False,
        )
        samples: Any = encoding["overflow_to_sample_mapping"]
        for one, sample in zip(fast_encodings(encoding), samples, strict=True):
            question = part.start + int(sample)
            ids, covered = np.array(one.ids, np.int32), _context_offsets(one)
            at = np.flatnonzero(ids == tokenizer.cls_token_id)
            rows["input_ids"].append(ids)
            if "token_type_ids" in encoding:
                rows.setdefault("token_type_ids", []).append(np.array(one.type_ids, np.int32))
            offsets.append(covered)
            owner.append(question)
            cls.append(int(at[0]) if len(at) else 0)
            if spans is not None:
                found = _find(covered, spans[question])
                positions.append((cls[-1], cls[-1]) if found is None else found)
    fill = {"input_ids": padding_id(tokenizer)}
    tokens = Ragged.of(rows, max_length=max_length, fill=fill)
    question = np.array(owner, np.int64)
    texts = [questions.questions[n] for n in owner]
    check_vocabulary(tokens.values["input_ids"], tokens.offsets, vocab_size, texts)
    fixed = {}
    lost: set[int] = set()
    if spans is not None:
        starts, ends = np.array(positions, np.int32).reshape(-1, 2).T
        fixed = {"start_positions": starts, "end_positions": ends}
        held = {int(n) for n in question[starts != np.array(cls)]}
        lost = {n for n, span in enumerate(spans) if span is not None} - held
    return QuestionWindows(
        columns=Columns((tokens,), fixed),
        question=question,
        offsets=np.concatenate([np.zeros((0, 2), np.int32), *offsets]),
        cls=np.array(cls, np.int64),
        lost=tuple(sorted(lost)),
    )


def _answer_spans(questions: Questions, problems: list[str]) -> list[tuple[int, int] | None] | None:
    """For each question the first answer's characters, from and up to; None where it has none."""
    if questions.answers is None:
        return None
    spans: list[tuple[int, int] | None] = []
    for n, (answers, context) in enumerate(zip(questions.answers, questions.contexts, strict=True)):
        spans.append(None)
        for text, start in answers:
            end = start + len(text)
            if not text.strip():
                problems.append(f"question {questions.ids[n]!r} has an empty answer")
            elif start < 0 or context[start:end] != text:
                problems.append(
                    f"question {questions.ids[n]!r}: its context has {context[start:end]!r} at "
                    f"{start}, the answer is {text!r}"
                )
            elif spans[-1] is None:
                # No token need cover the white space around it.
                lead = len(text) - len(text.lstrip())
                spans[-1] = (start + lead, start + len(text.rstrip()))
    return spans


def _cut(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> list[str]:
    """Texts without what is behind their first `length` tokens."""
    encoding = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    return [
        text if len(one) <= length else text[: one.offsets[length - 1][1]]
        for text, one in zip(texts, fast_encodings(encoding), strict=True)
    ]


def _context_offsets(encoding: Encoding) -> np.ndarray:
    """int32 [T, 2], -1 where a token is not of the second text."""
    covered = np.array(encoding.offsets, np.int32).reshape(-1, 2)
    second = np.array([sequence == 1 for sequence in encoding.sequence_ids], bool)
    return np.where(second[:, None], covered, np.int32(OUTSIDE))


def _find(covered: np.ndarray, span: tuple[int, int] | None) -> tuple[int, int] | None:
    """The tokens, first and last, that cover all of a span of characters; None where none do."""
    places = np.flatnonzero(covered[:, 0] != OUTSIDE)
    if span is None or not len(places):
        return None
    starts, ends = covered[places].T
    if starts[0] > span[0] or ends[-1] < span[1]:
        return None
    first = int(np.argmax(ends > span[0]))
    last = len(starts) - 1 - int(np.argmax(starts[::-1] < span[1]))
    return (int(places[first]), int(places[last])) if first <= last else None


def scoring_windows(documents: TokenDocuments, *, length: int, stride: int, pad_id: int) -> Columns:
    """Documents as windows in which each token but a document's first is scored exactly once.

    What is longer than a row is not cut, as for training, but read again: a token of a later
    window has at least ``length - stride`` tokens before it.

    A batch has ``input_ids``, ``attention_mask`` and ``labels`` int32 [B, T], not shifted, -100 for
    what an earlier window has scored.

    Args:
      documents: from `encode_documents`; with its ``bos_id`` the first token of each text is scored
        too.
      length: T.
      stride: tokens that are new in each window, less than `length`.
      pad_id: the token id of padding.

    Raises:
      ValueError: a stride or length out of its range.
    """
    if not 0 < stride < length:
        raise ValueError(f"stride={stride} must be from 1 to length - 1 = {length - 1}")
    ids, labels = [], []
    for begin, end in zip(
        documents.offsets[:-1].tolist(), documents.offsets[1:].tolist(), strict=True
    ):
        scored = begin
        for start in range(begin, end, stride):
            stop = min(start + length, end)
            window = documents.tokens[start:stop]
            ids.append(window)
            labels.append(np.where(np.arange(start, stop) < scored, IGNORED_LABEL, window))
            scored = stop
            if stop == end:
                break
    fill = {"input_ids": pad_id, "labels": IGNORED_LABEL}
    return Columns((Ragged.of({"input_ids": ids, "labels": labels}, max_length=length, fill=fill),))
