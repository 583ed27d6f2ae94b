"""The parts that every report page is put together from: frame, sections, tables, tiles. Every value is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources

from bitwright.report._model import Cell

MARK = "<p class=mark>bitwright</p>"
"""By which a page is known."""


def page(title: str, subtitle: str, sections: Iterable[str], *, head: str = "", script: str = "") -> str:
    """One HTML file that needs nothing else: styles and script are inside.

    Args:
        title, subtitle: plain text.
        sections: HTML, in order.
        head: further HTML for the head, such as a plotting library's scripts.
        script: further JavaScript, run after the page's own.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{asset('style.css')}</style>{head}</head><body><main>"
        f"<header>{MARK}<h1>{escape(title)}</h1><p class=sub>{escape(subtitle)}</p></header>"
        f"{''.join(sections)}</main><script>{asset('page.js')}{script}</script></body></html>\n"
    )


def asset(name: str) -> str:
    """A file of this package, as text."""
    return resources.files("bitwright.report").joinpath(name).read_text(encoding="utf-8")


def tile(label: str, value: str, below: str) -> str:
    """A figure with a label above and a remark below; plain text."""
    return f"<div class=tile><p>{escape(label)}</p><strong>{escape(value)}</strong><p>{escape(below)}</p></div>"


def section(title: str, content: str) -> str:
    """A heading, plain text, and what stands under it, HTML."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def figure(plot: str, caption: str) -> str:
    """A plot with its caption, both HTML."""
    return f"<figure>{plot}<figcaption>{caption}</figcaption></figure>"


def fold(title: str, content: str) -> str:
    """Content that opens on a click."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def numbered(lines: Iterable[str]) -> str:
    """A numbered list of sentences; what stands between backticks is code."""
    items = []
    for line in lines:
        pieces = [escape(piece) for piece in line.split("`")]
        items.append("".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(pieces)))
    return f'<ol class="next">{"".join(f"<li>{item}</li>" for item in items)}</ol>'


def facts(named: Mapping[str, str]) -> str:
    """Names and values in columns."""
    return f"<dl>{''.join(f'<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>' for k, v in named.items())}</dl>"


@dataclass(frozen=True)
class Link:
    """A cell that leads to another page, relative to this one."""

    text: str
    href: str


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell | Link]]) -> str:
    """A table that sorts by a click on a heading, and that scrolls; long ones get a filter."""
    head = "".join(f"<th scope=col>{escape(c)}</th>" for c in columns)
    body = "".join(f"<tr>{''.join(_cell(v) for v in row)}</tr>" for row in rows)
    return f"<div class=scroll tabindex=0><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(value: Cell | Link) -> str:
    if isinstance(value, Link):
        return f'<td><a href="{escape(value.href)}">{escape(value.text)}</a></td>'
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f'<td class="n" data-v="{value!r}">{escape(text(value))}</td>'
    return f"<td>{escape(text(value))}</td>"


def text(value: object) -> str:
    """A value as a reader wants it: four digits, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
