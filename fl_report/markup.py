"""Pieces of an HTML page that needs nothing but itself: escaped text, numbers, tables, pictures."""

from __future__ import annotations

import base64
import html
import struct
from string import Template
from typing import TYPE_CHECKING, Any

from fl_report.series import loss_told, sized

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from rich.table import Table


NONE = "—"
"""Stands for a number or text that is missing."""

DENSITY = 1.4
"""A picture's pixels per pixel of the page, so that it is sharp on a good screen."""


class Markup(str):
    """Text that is HTML already; all other text is escaped, also what is added to it."""

    def __add__(self, other: object) -> Markup:
        return Markup(super().__add__(text(other)))


def text(value: object) -> Markup:
    """What is no HTML yet, escaped."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def element(tag: str, content: object, **attributes: object) -> Markup:
    """<tag ...>content</tag>; `class_` is the attribute class."""
    told = "".join(f' {k.rstrip("_")}="{text(v)}"' for k, v in attributes.items())
    return Markup(f"<{tag}{told}>{text(content)}</{tag}>")


def number(value: float | None, shown: str = "{}") -> Markup:
    """A number as `shown` formats it, with all its digits for machines; a dash for none."""
    if value is None:
        return Markup(NONE)
    return element("data", shown.format(value), value=repr(value))


def accuracy(value: float | None) -> Markup:
    return number(value, "{:.4f}")


def loss(value: float | None) -> Markup:
    """Four digits behind the point, unless it has gone beyond all measure."""
    return number(value, "{:.4f}" if value is None or abs(value) < 1e4 else "{:.3e}")


def loss_of(row: Mapping[str, Any]) -> Markup:
    """The global model's in a round: a dash if it was not evaluated, words if it is not finite."""
    lost = row.get("accuracy") is not None and row.get("loss") is None
    return text(loss_told(None)) if lost else loss(row.get("loss"))


def size(count: int | None) -> Markup:
    """Bytes, as `sized` tells them."""
    return number(None) if count is None else element("data", sized(count), value=count)


def seconds(value: float | None) -> Markup:
    return number(value, "{:.1f} s" if value is None or value < 100 else "{:,.0f} s")


def joined(parts: Iterable[object], between: str = "\n") -> Markup:
    return Markup(between.join(map(text, parts)))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], cards: bool = False) -> Markup:
    """A row's first cell names it; columns of numbers stand to the right.

    cards: where the screen is narrow, each row is a box of its cells with their headings.
    """
    rows = [[text(cell) for cell in row] for row in rows]
    right: list[dict[str, str]] = [
        {"class_": "n"} if any(cell.startswith("<data") for cell in cells) else {}
        for cells in zip(*rows, strict=True)
    ] or [{} for _ in head]
    names = joined(
        element("th", cell, scope="col", **kind) for cell, kind in zip(head, right, strict=True)
    )
    lines = [
        element(
            "tr",
            element("th", row[0], scope="row", **right[0])
            + joined(
                (
                    element("td", cell, **kind, **({"data-head": name} if cards else {}))
                    for name, cell, kind in zip(head[1:], row[1:], right[1:], strict=True)
                ),
                "",
            ),
        )
        for row in rows
    ]
    whole = element("thead", element("tr", names)) + element("tbody", joined(lines))
    # What is wider than a phone scrolls by itself; tabindex: by keyboard too.
    made = element("table", whole, **({"class_": "cards"} if cards else {}))
    return element("div", made, class_="scroll", tabindex=0)


def of_rich(made: Table) -> Markup:
    """A table that was made for the terminal, with its caption above."""
    rows = zip(*(column.cells for column in made.columns), strict=True)
    caption = element("p", made.caption or "", class_="soft")
    return caption + table([column.header for column in made.columns], rows)


def folded(title: str, content: object) -> Markup:
    """What few readers want: shown at a click, and in print."""
    return element("details", element("summary", title) + content)


def section(title: str, *parts: object) -> Markup:
    """A section with its heading; nothing at all where there are no parts."""
    shown = [part for part in parts if part]
    return element("section", joined([element("h2", title), *shown])) if shown else Markup("")


class Pictures:
    """PNG files in a folder, each also inside the page."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def figure(self, name: str, draw: Callable[[Path], None], alt: str, caption: str) -> Markup:
        """`draw` writes the file it is given."""
        path = self.folder / f"{name}.png"
        draw(path)
        png = path.read_bytes()
        width, height = struct.unpack(">II", png[16:24])  # of the header chunk
        source = "data:image/png;base64," + base64.b64encode(png).decode()
        shown = {"width": round(width / DENSITY), "height": round(height / DENSITY)}
        sizes = " ".join(f'{key}="{value}"' for key, value in shown.items())
        image = Markup(f'<img alt="{text(alt)}" {sizes} src="{source}">')
        return element("figure", image + element("figcaption", caption))


def grid(figures: Sequence[Markup]) -> Markup:
    """Figures side by side, as many as there is room for."""
    return element("div", joined(figures), class_="grid") if figures else Markup("")


def page(title: str, body: Markup) -> str:
    """The whole document."""
    return _PAGE.substitute(title=text(title), style=_STYLE, body=body)


# The policy lets the page load nothing: what is on it is in it.
_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
$style</style>
</head>
<body>
$body
</body>
</html>
""")

_STYLE = """\
:root { --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --back: #fff; --card: #f6f8fa;
  --mark: #fff1c2; --bad: #b31d28; --good: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --line: #3d444d;
  --back: #15191f; --card: #1f252d; --mark: #4d3c00; --bad: #ff8f87; --good: #5fd07a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; color: var(--ink); background: var(--back);
  font: 16px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0.4rem 0 0; }
h2 { font-size: 1.15rem; margin: 0 0 0.6rem; }
h1, h2, h3, p, dd { overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 0.8rem 0 0.2rem; }
section { margin: 2rem 0 0; }
section > * + div, section > * + figure { margin-top: 0.8rem; }
p { margin: 0.4rem 0; max-width: 46rem; }
.soft, figcaption, small { color: var(--soft); font-size: 0.85rem; }
.bad { color: var(--bad); font-weight: 600; }
.good { color: var(--good); font-weight: 600; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 0.5rem;
  margin: 1rem 0 0; }
dl div { background: var(--card); border-radius: 6px; padding: 0.5rem 0.7rem; }
dl div.long { grid-column: 1 / -1; }
dt { color: var(--soft); font-size: 0.8rem; }
dd { margin: 0; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
small { display: block; font-weight: 400; }
dl div.long dd { font: 0.85rem/1.5 ui-monospace, "Liberation Mono", monospace; }
/* A shadow at the right edge, covered by the end of what scrolls. */
.scroll { overflow-x: auto; background:
  linear-gradient(to left, var(--back) 1.5rem, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--line), transparent) right / 1rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem 0.3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: break-word; }
td { max-width: 26rem; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; min-width: 5rem; max-width: min(26rem, 50vw); }
.n { text-align: right; }
td.n { white-space: nowrap; }
th.n[scope=row] { min-width: 0; }
mark { background: var(--mark); color: inherit; padding: 0 0.2rem; border-radius: 3px; }
.dot { font-size: 1.1em; line-height: 1; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr));
  gap: 0.8rem; }
figure { margin: 0; break-inside: avoid; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
.grid img { width: 100%; }
code, pre { font-family: ui-monospace, "Liberation Mono", monospace; font-size: 0.9em; }
pre { background: var(--card); border-radius: 6px; padding: 0.7rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
@media screen and (max-width: 40rem) {
  .cards thead { display: none; }
  .cards, .cards tbody { display: block; }
  .cards tr { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.2rem, 1fr));
    gap: 0.4rem 0.8rem; padding: 0.6rem 0; border-bottom: 1px solid var(--line); }
  .cards th, .cards td { border: 0; padding: 0; text-align: left; overflow-wrap: anywhere; }
  .cards tbody th { grid-column: 1 / -1; max-width: none; font-weight: 600; }
  .cards td { white-space: normal; align-self: end; }
  .cards td::before { content: attr(data-head); display: block; color: var(--soft);
    font-size: 0.8rem; }
}
details { margin: 0.6rem 0; }
summary { cursor: pointer; padding: 0.3rem 0; }
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --back: #fff; --card: #f3f3f3; --mark: #ffe9a0;
    --bad: #900; --good: #060; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; background: none; }
  table { font-size: 8.5pt; }
  .soft, figcaption, small { font-size: 8pt; }
  .cards, .cards small { font-size: 6.5pt; }
  .cards th, .cards td { padding-right: 0.25rem; }
  .cards tbody th, .cards code { overflow-wrap: anywhere; }
  .cards tbody th { min-width: 4rem; }
  mark, dl div, pre { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .grid { grid-template-columns: repeat(3, 1fr); }
  section { margin-top: 1rem; }
  h2, h3, summary, p:has(+ .scroll), thead, tbody tr:first-child { break-after: avoid; }
  tr, dl div { break-inside: avoid; }
  details::details-content { content-visibility: visible; }
  /* A browser that cannot open them leaves them out. */
  @supports not selector(details::details-content) { details { display: none; } }
}
"""
