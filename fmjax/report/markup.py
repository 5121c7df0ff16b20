"""Small builders of HTML: whatever is not already Markup is escaped, so nothing slips through."""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, SupportsFloat


class Markup(str):
    """Text that is HTML already and must not be escaped again."""

    __slots__ = ()


def escape(value: Any) -> Markup:
    """HTML for any value: Markup stays, everything else is turned into text and escaped."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


_PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+={0,2}")


def with_picture(text: str) -> str | Markup:
    """A picture, which is a `data:` URL of a PNG, as an <img>; any other text as it is."""
    if _PICTURE.fullmatch(text):
        return Markup(f'<img class="picture" src="{text}" alt="picture">')
    return text


def join(parts: Iterable[Any]) -> Markup:
    """The parts one after the other, each escaped unless it is Markup."""
    return Markup("\n".join(escape(part) for part in parts))


def paragraph(text: Any, *, kind: str = "") -> Markup:
    """A <p>, with the CSS class `kind` if given."""
    attribute = f' class="{kind}"' if kind else ""
    return Markup(f"<p{attribute}>{escape(text)}</p>")


def table(
    head: Sequence[Any],
    rows: Iterable[Sequence[Any]],
    *,
    caption: str,
    numeric: Sequence[int] = (),
    kind: str = "",
) -> Markup:
    """A <table> whose first column holds the row headings, in a box that scrolls by keyboard too.

    Args:
      head: column headings.
      rows: cells, as many a row as there are headings.
      caption: shown above the table.
      numeric: indices of the columns of numbers, which are aligned to the right.
      kind: CSS class of the table.

    Returns:
      The markup.
    """

    def css(column: int) -> str:
        return ' class="number"' if column in numeric else ""

    headings = "".join(
        f'<th scope="col"{css(column)}>{escape(cell)}</th>' for column, cell in enumerate(head)
    )
    lines = []
    for first, *others in rows:
        cells = "".join(
            f"<td{css(column)}>{escape(cell)}</td>" for column, cell in enumerate(others, start=1)
        )
        lines.append(f'<tr><th scope="row"{css(0)}>{escape(first)}</th>{cells}</tr>')
    attribute = f' class="{kind}"' if kind else ""
    return Markup(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(caption)}">'
        f"<table{attribute}><caption><span>{escape(caption)}</span></caption>"
        f"<thead><tr>{headings}</tr></thead><tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def figure(title: str, svg: str, *, note: str = "") -> Markup:
    """A chart with its title and a line of explanation."""
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return Markup(f"<figure><h3>{escape(title)}</h3>{svg}{caption}</figure>")


class Section(NamedTuple):
    """A titled part of the page; `link` is its name in the navigation."""

    identifier: str
    link: str
    title: str
    body: Sequence[Any]

    def markup(self) -> Markup:
        return Markup(
            f'<section id="{self.identifier}" aria-labelledby="{self.identifier}-title">'
            f'<h2 id="{self.identifier}-title">{escape(self.title)}</h2>\n'
            f"{join(self.body)}\n</section>"
        )


def folded(summary: str, body: Any) -> Markup:
    """Content that opens on a click or a key press."""
    return Markup(f"<details><summary>{escape(summary)}</summary>{escape(body)}</details>")


def score(value: SupportsFloat) -> str:
    """A metric with four decimals."""
    return f"{float(value):.4f}".replace("-", "\N{MINUS SIGN}")


def count(value: int) -> str:
    """A whole number with separators: 22,713,986."""
    return f"{value:,}"


def short(value: float) -> str:
    """A number with four significant digits: 0.6931, 2e-05; whole from a thousand on: 12,345."""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Time as people say it: 0.8 s, 42 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
