"""The style sheet of the page, for light and dark mode and all screen widths, without external resources."""

STYLE = """
:root{color-scheme:light dark;--page:#fcfcfb;--card:#fff;--ink:#1b1d20;--dim:#63686f;--rule:#e4e4e0;--good:#17794a;
--bad:#b3362f;--tint:#f3f3ef;--c0:#2368b5;--c1:#d0641b;--c2:#17845a;--c3:#8550b8;--c4:#b83a5c;--c5:#6d7178}
@media(prefers-color-scheme:dark){:root{--page:#15171a;--card:#1c1f23;--ink:#e7e8ea;--dim:#9aa0a8;--rule:#31353b;
--good:#5cc98f;--bad:#f1857d;--tint:#23272c;--c0:#6fb1f2;--c1:#f2a05c;--c2:#56c795;--c3:#b99af0;--c4:#f07f9d;
--c5:#a3a8b0}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif}
main{max-width:1000px;margin:0 auto;padding:20px 16px 60px}
h1{font-size:1.6rem;margin:.2em 0}h2{font-size:1.15rem;margin:2.2em 0 .6em;padding-top:.8em;
border-top:1px solid var(--rule)}h3{font-size:1rem;margin:1.4em 0 .4em}
p{margin:.4em 0}.dim,.notes{color:var(--dim)}.notes{font-size:.85rem;padding-left:1.1em;margin:.5em 0}
nav{font-size:.85rem;margin:.6em 0}nav a{color:var(--c0);margin-right:1em;white-space:nowrap;display:inline-block}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:1em 0}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:10px 12px}
.tile b{display:block;font-size:1.5rem;font-variant-numeric:tabular-nums;line-height:1.25}
.tile span{font-size:.8rem;color:var(--dim);display:block}
.scroll{overflow-x:auto}
@media(max-width:640px){.scroll.many::before{content:"scroll sideways for more columns \\2192";
position:sticky;left:0;color:var(--dim);font-size:.8rem}
.many th:first-child,.many td:first-child{position:sticky;left:0;
background:var(--page);white-space:normal;max-width:9em}}
td.wide,th.wide{white-space:normal;text-align:left;min-width:22em}
table{border-collapse:collapse;font-size:.87rem;font-variant-numeric:tabular-nums;margin:.3em 0}
th,td{padding:4px 18px 4px 0;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}
th{font-weight:600;color:var(--dim);vertical-align:bottom;white-space:normal;min-width:4.5em}
th:first-child,td:first-child{text-align:left}
.charts{margin-top:1em;display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,360px),1fr));gap:18px 26px}
figure{margin:0;min-width:0}figcaption{font-size:.87rem}
svg.chart{width:100%;height:auto;max-width:560px;display:block;font-size:12px;overflow:visible}
svg text{fill:var(--dim);font-variant-numeric:tabular-nums}
svg path{fill:none;stroke-width:2;stroke-linejoin:round}svg .rule{stroke:var(--rule);stroke-width:1}
svg .level{stroke-dasharray:5 4;stroke-width:1.5}svg .faint{opacity:.3;stroke-width:1}svg .bar{stroke-width:2}
svg .cell{fill:var(--c0)}
.s0{stroke:var(--c0)}.s1{stroke:var(--c1)}.s2{stroke:var(--c2)}.s3{stroke:var(--c3)}.s4{stroke:var(--c4)}
.s5{stroke:var(--c5)}
.d0{fill:var(--c0)}.d1{fill:var(--c1)}.d2{fill:var(--c2)}.d3{fill:var(--c3)}.d4{fill:var(--c4)}.d5{fill:var(--c5)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 14px;padding:0;margin:.2em 0 .4em;font-size:.8rem;
color:var(--dim)}
tr.main td{font-weight:600}
svg.key{width:18px;height:8px;margin-right:5px;vertical-align:middle}
details{margin:.5em 0}summary{cursor:pointer}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:2px 0 0;font:.83rem/1.45 ui-monospace,SFMono-Regular,Menlo,
"DejaVu Sans Mono",monospace}
code{font:.83em ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
.trajectory{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:8px 12px}
.verdict{font-weight:600}.right{color:var(--good)}.wrong{color:var(--bad)}
.block{border-left:3px solid var(--rule);padding:2px 0 2px 10px;margin:8px 0}
.block b{font-size:.78rem;color:var(--dim)}.block code{font-size:.75rem;color:var(--dim)}
.block.question{border-color:var(--c3)}.block.thinking{border-color:var(--c5)}.block.thinking pre{color:var(--dim)}
.block.call{border-color:var(--c0)}.block.result{border-color:var(--c1);background:var(--tint)}
.block.answer{border-color:var(--c2)}.block.grade.right{border-color:var(--good)}
.block.grade.wrong{border-color:var(--bad)}.block.grade p{font-size:.85rem;color:var(--ink)}
.block.declaration summary{font-size:.78rem;color:var(--dim)}
"""
