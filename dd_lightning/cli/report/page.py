"""A report as a page: one list of parts, written as HTML in one file without requests, and as Markdown."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

_PAGE = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))

Table = tuple[list[str], list[list[str]]]
"""A heading and rows; a cell that is empty in the first column belongs to the row above."""


@dataclass(frozen=True)
class Picture:
    """A picture: its file's name, what it shows, and its bytes."""

    name: str
    caption: str
    data: bytes


Part = str | Table | Picture | list[Picture]
"""A paragraph, or a heading if it begins with #; a table; a figure; a row of small pictures."""


def as_html(parts: Sequence[Part]) -> bytes:
    """Return a page that needs no other file; its title is the first part."""
    title = escape(str(parts[0]).lstrip("# "))
    return _PAGE.substitute(title=title, body="\n".join(map(_html, parts))).encode()


def as_markdown(parts: Sequence[Part]) -> bytes:
    """Return the same in Markdown; pictures are files beside it."""
    return ("\n\n".join(map(_markdown, parts)) + "\n").encode()


def _html(part: Part) -> str:
    if isinstance(part, str):
        level = len(part) - len(part.lstrip("#"))
        return f"<h{level}>{escape(part[level + 1 :])}</h{level}>" if level else f"<p>{escape(part)}</p>"
    if isinstance(part, Picture):
        kind, data = "svg+xml" if part.name.endswith(".svg") else "png", base64.b64encode(part.data).decode()
        return f'<img src="data:image/{kind};base64,{data}" alt="{escape(part.caption)}">'
    if isinstance(part, list):
        shown = (f"<figure>{_html(each)}<figcaption>{escape(each.caption)}</figcaption></figure>" for each in part)
        return f'<div class="pictures">{"".join(shown)}</div>'
    heading, rows = part
    lines = ["".join(f'<th scope="col">{escape(cell)}</th>' for cell in heading)]
    for row in rows:
        begins = ' class="begin"' * bool(row[0])
        lines.append("".join(f"<td{begins}>{escape(cell)}</td>" for cell in row))
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>\n{body}\n</table></div>'


def _markdown(part: Part) -> str:
    if isinstance(part, Picture):
        return f"![{part.caption}]({part.name.replace('.svg', '.png')})"
    if isinstance(part, list):
        return "\n".join(map(_markdown, part)) + "\n\n" + ", ".join(each.caption for each in part)
    if isinstance(part, tuple):
        heading, rows = part
        return "\n".join(f"| {' | '.join(line)} |" for line in [heading, ["---"] * len(heading), *rows])
    return part
