"""The frame and the style of the HTML report."""

__all__ = ["PAGE", "STYLE"]

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{header}
{body}
{footer}
</main>
</body>
</html>
"""

STYLE = """
:root { --page: #f6f7f9; --card: #fff; --ink: #1e293b; --muted: #64748b; --line: #e2e8f0;
  --good: #047857; --bad: #b91c1c; --accent: #2563eb;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Liberation Sans",
    sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0f172a; --card: #1e293b; --ink: #e2e8f0; --muted: #94a3b8; --line: #334155;
    --good: #34d399; --bad: #f87171; --accent: #60a5fa;
    --c-ffffff: #1e293b; --c-1e293b: #e2e8f0; --c-64748b: #94a3b8;
    --c-e2e8f0: #334155; --c-94a3b8: #64748b; --c-2563eb: #60a5fa;
    --c-dc2626: #f87171; --c-d97706: #fbbf24; --c-059669: #34d399; --c-7c3aed: #a78bfa; --c-0891b2: #22d3ee;
    --c-be185d: #f472b6; --c-4d7c0f: #a3e635; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 var(--font); }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 56px; }
header { margin-bottom: 28px; }
.eyebrow { margin: 0; color: var(--accent); font-size: 13px; font-weight: 600; letter-spacing: .04em;
  text-transform: uppercase; }
h1 { margin: 4px 0; font-size: 32px; line-height: 1.2; font-weight: 650; overflow-wrap: anywhere; }
.lead { margin: 0; color: var(--muted); font-size: 16px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 16px;
  margin-bottom: 16px; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 16px 18px; }
.tile h2 { margin: 0; font-size: 13px; font-weight: 500; color: var(--muted); }
.tile .value { margin: 2px 0; font-size: 26px; line-height: 1.3; font-weight: 650; white-space: nowrap; }
.tile .value small { font-size: 15px; font-weight: 500; }
.tile .detail { margin: 0; font-size: 13px; color: var(--muted); font-variant-numeric: tabular-nums; }
.tile.good .value, .good { color: var(--good); }
.tile.bad .value, .bad { color: var(--bad); }
.card { padding: 22px 24px; margin-bottom: 16px; }
.card > h2, footer h2 { margin: 0 0 12px; font-size: 18px; font-weight: 600; }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: var(--font) !important; }
figcaption, .caption { margin: 8px 0 0; color: var(--muted); font-size: 13px; }
.scroll { overflow-x: auto; margin-top: 16px; }
table { width: 100%; border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--muted); font-weight: 500; white-space: nowrap; }
.nowrap { white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
tbody tr:last-child td { border-bottom: 0; }
code { font: 12.5px var(--mono); overflow-wrap: break-word; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--accent); font-size: 13px; }
ul { margin: 0; padding-left: 20px; }
footer { margin-top: 28px; padding: 0 2px; color: var(--muted); }
footer h2 { font-size: 14px; margin-bottom: 8px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 0; font-size: 13px; }
dd { margin: 0; overflow-wrap: anywhere; }
svg.narrow { display: none; max-width: 520px; }
@media screen and (max-width: 860px) { svg.wide { display: none; } svg.narrow { display: block; } }
@media screen and (max-width: 560px) {
  main { padding: 20px 12px 32px; } .card { padding: 16px 14px; } .tile { padding: 12px 14px; }
  .tiles { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; } h1 { font-size: 24px; }
  .tile .value { font-size: 21px; white-space: normal; }
}
@media print { body { background: #fff; } .card, .tile { break-inside: avoid; } }
"""
