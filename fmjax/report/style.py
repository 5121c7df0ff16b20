"""The report's style sheet; its variables, light and dark, also colour the charts."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #14171c; --muted: #565e6b; --grid: #e1e4ea;
  --first: #1f63c9; --second: #c2500f; --heat: 31 99 201; --notice: #fff5dd; --notice-edge: #d9a400;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1115; --card: #171a20; --ink: #e9ecf1; --muted: #a2abb9; --grid: #2c323c;
    --first: #6aa5ff; --second: #f0935a; --heat: 74 134 232; --notice: #2d2611;
    --notice-edge: #b98d12;
  }
}
*, *::before, *::after { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
.skip { position: absolute; left: -100vw; }
.skip:focus { left: 1rem; top: 1rem; background: var(--card); padding: .5rem 1rem; z-index: 1; }
header, nav, main, footer { max-width: 68rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.25rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .35rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .9rem; }
h3 { font-size: .95rem; margin: 0 0 .4rem; }
p { margin: 0 0 .8rem; max-width: 46rem; }
.lead, figcaption, .note { color: var(--muted); }
a { color: var(--first); }
:focus-visible { outline: 3px solid var(--first); outline-offset: 2px; border-radius: 4px; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; list-style: none;
  margin: .9rem 0 1.4rem; padding: 0; font-size: .9rem; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { background: var(--card); border: 1px solid var(--grid); border-radius: 12px;
  padding: 1.35rem 1.5rem; margin: 0 0 1.25rem; scroll-margin-top: 1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.4rem, 1fr)); gap: .75rem;
  margin: 0 0 1.4rem; padding: 0; }
.tile { border: 1px solid var(--grid); border-radius: 10px; padding: .8rem .95rem; }
.tile dt { color: var(--muted); font-size: .82rem; }
.tile dd { margin: 0; }
.tile .value { font-size: 1.25rem; font-weight: 650; line-height: 1.25;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tile .note { font-size: .82rem; line-height: 1.4; }
.notice { background: var(--notice); border-left: 4px solid var(--notice-edge); border-radius: 6px;
  padding: .7rem .95rem; max-width: none; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr));
  gap: 1.6rem 2rem; }
figure { margin: 0; min-width: 0; max-width: 34rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { font-size: .85rem; margin-top: .35rem; }
.scroll { overflow-x: auto; margin: 0 0 1.1rem; }
.scroll:last-child { margin-bottom: 0; }
.picture { height: 3.5rem; image-rendering: pixelated; }
#samples .picture { height: 8rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); font-size: .85rem; padding: 0 0 .4rem; }
/* The caption stays in view when a wide table is scrolled sideways. */
caption span { display: inline-block; position: sticky; left: 0;
  max-width: min(46rem, calc(100vw - 4rem)); }
th, td { text-align: left; vertical-align: top; padding: .4rem .9rem .4rem 0;
  border-bottom: 1px solid var(--grid); }
thead th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; }
@media (min-width: 40rem) { table:not(.wide) tbody th { white-space: nowrap; } }
td.number { text-align: right; white-space: nowrap; }
th.number { text-align: right; }
.wide { width: 100%; }
.wide th:first-child { min-width: min(22rem, 60vw); overflow-wrap: anywhere; }
.facts th { color: var(--muted); white-space: nowrap; }
.facts td { overflow-wrap: anywhere; }
.facts thead { position: absolute; clip-path: inset(50%); }
.matrix { border-collapse: separate; border-spacing: 3px; }
.matrix th, .matrix td { border: 0; padding: .45rem .7rem; }
.matrix td { text-align: right; border-radius: 6px; min-width: 4.2rem; }
.matrix .share { display: block; font-size: .78rem; color: var(--ink); }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1.1rem 2.5rem; }
.columns > * { min-width: 0; }
details { margin: .4rem 0; }
th details { margin: 0; }
summary { cursor: pointer; }
code, pre { font: .86em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { margin: 0 0 1.1rem; padding: .75rem .95rem; background: var(--page); border-radius: 8px;
  border: 1px solid var(--grid); white-space: pre-wrap; overflow-wrap: anywhere; }
footer { color: var(--muted); font-size: .85rem; padding-bottom: 2.5rem; }
@media (max-width: 40rem) {
  header { padding-top: 1.4rem; }
  header, nav, main, footer { padding-left: .8rem; padding-right: .8rem; }
  section { padding: 1.1rem 1rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
  th, td { padding-right: .6rem; }
  table { font-size: .84rem; }
  .wide th:first-child { min-width: 42vw; }
  .matrix th, .matrix td { padding: .4rem .5rem; min-width: 0; }
}
@media print {
  body { background: none; }
  nav, .skip { display: none; }
  section, figure { break-inside: avoid; }
}
"""
