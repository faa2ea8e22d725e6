# SPDX-License-Identifier: Apache-2.0
"""A page of one file, with plots in it that follow the reader's light or dark setting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from string import Template

from .style import DARK, LIGHT, css_variables

__all__ = ["Page", "Section"]

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; $light }
@media (prefers-color-scheme: dark) { :root { $dark } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 2.5rem) 3rem; }
header p { margin: 0; }
.kicker { color: var(--muted); font-size: .875rem; }
h1 { font-size: clamp(1.35rem, 3.2vw, 2rem); line-height: 1.22; letter-spacing: -.015em; font-weight: 650;
  margin: .35rem 0 .6rem; max-width: 46ch; text-wrap: balance; }
h1::before { content: ""; display: block; width: 3rem; height: .3rem; margin-bottom: .9rem; background: var(--$tone); }
.more { color: var(--ink); max-width: 75ch; }
dl.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.6rem, 1fr)); gap: 1.1rem 1.6rem;
  margin: 1.9rem 0 0; }
dl.tiles div { border-top: 2px solid var(--grid); padding-top: .55rem; display: flex; flex-direction: column; }
dl.tiles dd { order: -1; }
dt { color: var(--muted); font-size: .8rem; line-height: 1.3; }
dd { margin: 0; font-size: 1.45rem; font-weight: 600; letter-spacing: -.01em; font-variant-numeric: tabular-nums; }
h2 { font-size: 1.12rem; font-weight: 650; margin: 2.6rem 0 1rem; padding-top: 1rem;
  border-top: 1px solid var(--grid); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); gap: 2rem 2.4rem; }
figure { margin: 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; overflow-x: auto; }
figure.wide svg { min-width: 40rem; overflow: hidden; }
figure h3 { font-size: .95rem; font-weight: 600; margin: 0 0 .35rem; }
figcaption { color: var(--muted); font-size: .84rem; line-height: 1.45; margin-top: .35rem; max-width: 65ch; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem 1.4rem .3rem 0; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { color: var(--muted); font-weight: 500; }
th:first-child, td:first-child { text-align: left; }
footer { margin-top: 3rem; color: var(--muted); font-size: .82rem; overflow-wrap: anywhere; }
@media print { main { max-width: none; padding: 0; } figure, table { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<header><p class="kicker">$kicker</p><h1>$headline</h1>$more</header>
<dl class="tiles">$tiles</dl>
$sections
<footer>$footer</footer>
</main>
</body>
</html>
""")


@dataclass(frozen=True)
class Section:
    """A heading with plots, and perhaps a table, under it.

    Args:
        title: the heading.
        plots: for each a title, an ``<svg>``, a caption, and whether it takes the page's whole width.
        table: a title, the columns' names, and rows of texts.
    """

    title: str
    plots: Sequence[tuple[str, str, str, bool]]
    table: tuple[str, Sequence[str], Sequence[Sequence[str]]] | None = None

    def html(self) -> str:
        """The section's elements."""
        plots = "".join(
            f"<figure{' class=wide' * wide}><h3>{escape(title)}</h3>{svg}"
            f"<figcaption>{escape(caption)}</figcaption></figure>"
            for title, svg, caption, wide in self.plots
        )
        if self.table is not None:
            title, columns, rows = self.table
            head = "".join(f"<th>{escape(column)}</th>" for column in columns)
            body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
            plots += (
                f'<figure><h3>{escape(title)}</h3><div class="scroll"><table><thead><tr>{head}</tr></thead>'
                f"<tbody>{body}</tbody></table></div></figure>"
            )
        return f'<section><h2>{escape(self.title)}</h2><div class="plots">{plots}</div></section>'


@dataclass(frozen=True)
class Page:
    """What the page says.

    Args:
        title: in the browser's tab.
        kicker: a line above the headline.
        headline: the verdict.
        good: whether that is good news.
        more: sentences below it.
        tiles: key figures, by what they mean.
        sections: the rest.
        footer: how the page came about.
    """

    title: str
    kicker: str
    headline: str
    good: bool
    more: str = ""
    tiles: Mapping[str, str] = field(default_factory=dict)
    sections: Iterable[Section] = ()
    footer: str = ""

    def html(self) -> str:
        """The page.

        Example:
            >>> page = Page("queue", "run 1", "All is well & fast", good=True).html()
            >>> "<h1>All is well &amp; fast</h1>" in page
            True
        """
        tiles = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in self.tiles.items()
        )
        return _PAGE.substitute(
            title=escape(self.title),
            kicker=escape(self.kicker),
            headline=escape(self.headline),
            tone="good" if self.good else "waiting",
            more=f'<p class="more">{escape(self.more)}</p>' if self.more else "",
            tiles=tiles,
            sections="\n".join(section.html() for section in self.sections),
            footer=escape(self.footer),
            light=_css(css_variables(LIGHT)),
            dark=_css(css_variables(DARK)),
        )


def _css(variables: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {color};" for name, color in variables.items())
