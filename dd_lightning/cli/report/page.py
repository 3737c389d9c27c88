"""A report as a page: one list of parts, written as HTML in one file without requests, and as Markdown."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template

from dd_lightning.cli.report.tables import Table

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #111; background: #fff; max-width: 1120px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.7em; margin-bottom: .2em } h2 { font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #999 }
p, li { max-width: 75em } p.small { color: #444; font-size: .9em }
div.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .88em; margin: .8em 0 }
th, td { padding: .25em .7em; text-align: right; font-variant-numeric: tabular-nums }
th { border-bottom: 1.5px solid #111; vertical-align: bottom } td { border-bottom: 1px solid #ddd }
table:not(.numbers) td, th:first-child, td:first-child { text-align: left }
table { border-top: 1.5px solid #111; border-bottom: 1.5px solid #111 }
img { max-width: 100% } div.sets { display: flex; flex-wrap: wrap; gap: 1.2em } figure { margin: 0 } figcaption { font-size: .85em }
div.sets img { width: 250px; image-rendering: pixelated; border: 1px solid #bbb }
</style>
</head>
<body>
$body
</body>
</html>
""")


@dataclass(frozen=True)
class Picture:
    """A picture: its file's name, what it shows, and its bytes as they go into the page."""

    name: str
    caption: str
    data: bytes

    @property
    def uri(self) -> str:
        """The picture itself, as an address."""
        kind = "svg+xml" if self.name.endswith(".svg") else "png"
        return f"data:image/{kind};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True)
class Heading:
    """The title of a part, or of the page."""

    text: str
    level: int = 2


Part = Heading | str | Table | Picture | list[Picture]


def as_html(title: str, parts: Sequence[Part]) -> str:
    """Return a page that needs no other file."""
    return _PAGE.substitute(title=html.escape(title), body="\n".join(map(_html, parts)))


def as_markdown(parts: Sequence[Part]) -> str:
    """Return the same in Markdown; pictures are files beside it."""
    return "\n\n".join(map(_markdown, parts)) + "\n"


def _html(part: Part) -> str:
    match part:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case str():
            return f"<p>{html.escape(part)}</p>"
        case Picture():
            return f'<img src="{part.uri}" alt="{html.escape(part.caption)}">'
        case list():
            shown = (
                f"<figure>{_html(each)}<figcaption>{html.escape(each.caption)}</figcaption></figure>" for each in part
            )
            return f'<div class="sets">{"".join(shown)}</div>'
        case (heading, rows):
            top = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in heading)
            lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
            body = "\n".join(f"<tr>{line}</tr>" for line in lines)
            return f'<div class="wide"><table class="numbers">\n<tr>{top}</tr>\n{body}\n</table></div>'


def _markdown(part: Part) -> str:
    match part:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case str():
            return part
        case Picture():
            return f"![{part.caption}]({part.name.replace('.svg', '.png')})"
        case list():
            return "\n\n".join(f"{_markdown(each)} {each.caption}" for each in part)
        case (heading, rows):
            lines = [heading, ["---"] * len(heading), *rows]
            return "\n".join("| " + " | ".join(line) + " |" for line in lines)
