"""Parts of a standalone HTML page: style for light, dark and print, tables and figures."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from html import escape

from repmetrics.report.drawing import palette

STYLE = (
    palette(":root")
    + """
:root{--band:#f4f6f9;--good:#2c7a40;--bad:#b5402a}
@media screen and (prefers-color-scheme:dark){:root{--band:#1d222b;--good:#6cc795;--bad:#f08a72}}
*{box-sizing:border-box}body{font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--paper);
max-width:72rem;margin:2.5rem auto;padding:0 1.2rem}h1{font-size:1.5rem;margin:0 0 .3rem}
h2{margin:2.4rem 0 .6rem;font-size:1.25rem}h3{font-size:1rem;margin:1.6rem 0 .3rem}
p.lead,figcaption,footer{color:var(--soft)}p.lead{margin-top:0}ul{padding-left:1.2rem;margin:.4rem 0}
.verdict{border-left:5px solid var(--good);background:var(--band);padding:.8rem 1rem;margin:1rem 0;font-size:1.15rem}
.verdict.alarm{border-color:var(--bad)}.verdict.unknown{border-color:var(--soft)}.verdict ul{font-size:.92rem}
table{border-collapse:collapse;font-size:.82rem;font-variant-numeric:tabular-nums;width:100%}
tr{background:var(--paper)}
th,td{padding:.28rem .35rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{position:sticky;left:0;background:inherit}
th{white-space:normal}th:first-child,td:first-child{text-align:left}tr:nth-child(even){background:var(--band)}
th.text,td.text{text-align:left}td.text{white-space:normal;min-width:12rem}
table.marks th,table.marks td{text-align:center}table.marks td:first-child{text-align:left}
.wide{overflow-x:auto}b.yes{color:var(--good)}b.no{color:var(--bad)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:0 1.2rem}
figure{margin:.6rem 0 1.2rem;break-inside:avoid}figcaption{font-size:.86rem}
figure svg{display:block;width:100%;height:auto}
summary{cursor:pointer;font-weight:600;margin:.8rem 0}footer{font-size:.86rem;margin-top:2rem}
img{max-width:100%;image-rendering:pixelated}.stages{display:flex;flex-wrap:wrap;gap:.4rem 1.4rem}
.stages p,.tokens p{margin:.3rem 0;font-size:.86rem;color:var(--soft)}.map input{margin:0 .3rem 0 0}
.map label{margin-right:1.2rem;font-size:.86rem}.map{display:flex;flex-wrap:wrap;align-items:center}
.map figcaption,.map .line{flex-basis:100%}
.plot{position:relative;flex:1 1 20rem;max-width:34rem;aspect-ratio:1;margin:.8rem .8rem .8rem 0;
border:1px solid var(--line)}
.plot i{position:absolute;width:.6rem;height:.6rem;margin:-.3rem;border-radius:50%;background:var(--g);
border:1px solid var(--paper)}.label:checked~.plot i{background:var(--l)}.plot i:hover{z-index:2}
.plot i:hover::after{content:"";position:absolute;left:.9rem;top:-3rem;width:96px;height:96px;
background-position:var(--p);border:2px solid var(--ink)}.plot i.e:hover::after{left:auto;right:.9rem}
@media print{body{max-width:none;margin:0;font-size:11px}summary{list-style:none}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
)
UNFOLD = "addEventListener('beforeprint',()=>document.querySelectorAll('details').forEach(d=>d.open=true))"


def document(title: str, parts: Sequence[str]) -> str:
    """A complete page that loads nothing. Folded parts open for print."""
    head = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style><script>{UNFOLD}</script>"
    )
    return "\n".join([head, f"<h1>{escape(title)}</h1>", *parts]) + "</html>\n"


def table(heads: Sequence[str], body: Sequence[Sequence[str]], *, texts: Collection[str] = ()) -> str:
    """A table that scrolls where it is wider than the page. Cells are HTML; heads are text, as are those columns."""
    classes = [" class=text" if head in texts else "" for head in heads]
    rows = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}" for kind, cell in zip(classes, row, strict=True)) for row in body
    )
    first = "".join(f"<th{kind}>{escape(head)}" for kind, head in zip(classes, heads, strict=True))
    return f"<div class=wide><table><tr>{first}{rows}</table></div>"


def figure(svg: str, caption: str = "") -> str:
    """A figure with its caption."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def details(summary: str, content: str) -> str:
    """A folded part."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def items(lines: Sequence[str]) -> str:
    """A list of sentences, with what is in backticks as code; nothing without any."""
    marked = [re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(line)) for line in lines]
    return "<ul>" + "".join(f"<li>{line}" for line in marked) + "</ul>" if lines else ""
