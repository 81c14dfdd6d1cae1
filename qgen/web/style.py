"""How the page looks: system fonts (nothing is fetched), Gradio's colours, which follow dark mode, and one column on a phone."""

__all__ = ["CSS", "HEAD", "theme"]

from typing import Any

_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")

HEAD = '<meta name="color-scheme" content="light dark">'


def theme() -> Any:
    import gradio as gr

    return gr.themes.Default(primary_hue="blue", neutral_hue="zinc", radius_size="md", font=_SANS, font_mono=_MONO).set(
        block_label_text_weight="600",
        block_title_text_weight="600",
        body_text_color_subdued="*neutral_500",  # the usual one is too pale to read on white
        block_info_text_color="*neutral_500",
    )


CSS = """
.gradio-container{--paper:var(--body-background-fill);--ink:var(--body-text-color);--soft:var(--body-text-color-subdued);
--line:var(--border-color-primary);--card:var(--background-fill-secondary);--held:#2563c9;--fit:#9dbcf0;--weight:#8b8b96;--warn:#b42318}
.dark .gradio-container,.gradio-container.dark,.dark{--held:#6ea3ff;--fit:#35517f;--weight:#77778a;--warn:#ff8a7a}
.gradio-container{max-width:1180px!important;margin:0 auto!important}
#title h1{margin:0;font-size:24px}
#title p{margin:4px 0 0;color:var(--soft);max-width:85ch}
#preparing:not(:has(.q)){display:none}
#save{align-self:flex-end}
.status{min-height:28px}
.q{color:var(--ink);min-width:0;max-width:100%}
.q tr{border:0!important}
.q .line{display:flex;flex-wrap:wrap;gap:4px 12px;align-items:center;margin:0 0 4px;font-size:14px}
.q .track{height:8px;border-radius:4px;background:var(--line);overflow:hidden}
.q .track i{display:block;height:100%;background:var(--held);transition:width .2s}
.q .chip{display:inline-block;padding:1px 9px;border-radius:9px;border:1px solid var(--line);font-size:13px;font-weight:600}
.q .chip.failed{color:var(--warn);border-color:var(--warn)}
.q .soft,.q .about{color:var(--soft);font-size:13px;margin:0 0 8px}
.q h2{margin:22px 0 4px;font-size:17px}
.q .tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px}
.q .tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 14px}
.q .tile b{display:block;font-size:21px;line-height:1.3;font-variant-numeric:tabular-nums}
.q .tile span{color:var(--soft);font-size:13px;overflow-wrap:anywhere}
.q table{width:100%;border-collapse:collapse;font-size:14px;border:0!important;margin:0!important}
.q th,.q td{border:0!important;border-bottom:1px solid var(--line)!important}
.q .heat th,.q .heat td{border:0!important}
.q th{padding:6px 10px 6px 0;text-align:left;color:var(--soft);font-weight:600;font-size:13px;border-bottom:1px solid var(--line)}
.q td{padding:7px 10px 7px 0;vertical-align:top;border-bottom:1px solid var(--line);overflow-wrap:anywhere}
.q .n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.q th.n+th:not(.n),.q td.n+td:not(.n){padding-left:16px}
.q code,.q pre,.q .path{font-family:var(--font-mono);font-size:13px}
.q pre{margin:8px 0;padding:10px 12px;background:var(--card);border:1px solid var(--line);border-radius:8px;white-space:pre-wrap;
overflow-wrap:anywhere}
.q summary{cursor:pointer;padding:8px 0;color:var(--held);font-weight:600}
.q .legend{display:flex;flex-wrap:wrap;gap:6px 20px;margin:0 0 8px;color:var(--soft);font-size:13px}
.q .key{display:inline-block;width:22px;height:9px;margin-right:7px;border-radius:2px}
.q .layers{border-top:1px solid var(--line)}
.q .layer{display:grid;grid-template-columns:minmax(230px,31%) 1fr 172px;gap:2px 18px;padding:9px 0;border-bottom:1px solid var(--line)}
.q .layer .path{overflow-wrap:anywhere;font-weight:600}
.q .facts{grid-column:1/-1;color:var(--soft);font-size:12.5px;overflow-wrap:anywhere}
.q .bars{align-self:center}
.q .bar{height:9px;margin:2px 0;border-radius:2px;min-width:2px}
.q .held{background:var(--held)}.q .fit{background:var(--fit)}.q .weight{background:var(--weight)}
.q .db{text-align:right;font-variant-numeric:tabular-nums}
.q .db span{color:var(--soft);font-size:12.5px}
.q .small{display:block;color:var(--soft);font-size:12.5px}
.q .warn{color:var(--warn);font-weight:600}
.q .scroll{overflow-x:auto;border:1px solid var(--line);border-radius:8px;max-height:560px;overflow-y:auto}
.q table.heat{border-collapse:separate;border-spacing:1px;font-size:12px}
.q .heat th{position:sticky;top:0;background:var(--card);padding:5px 6px;text-align:center;white-space:nowrap;z-index:1}
.q .heat th[scope=row]{left:0;text-align:left;font-family:var(--font-mono);font-weight:400;color:var(--ink);max-width:300px;
overflow:hidden;
text-overflow:ellipsis;position:sticky;z-index:1}
.q .heat thead th:first-child{left:0;z-index:2}
.q .heat td{padding:4px 5px;text-align:center;border:0;font-variant-numeric:tabular-nums;min-width:38px}
.q svg{width:100%;max-width:760px;height:auto;display:block}
.q svg text{fill:var(--soft);font-size:11px}
.q svg .axis{stroke:var(--line)}
.q svg .mark{fill:var(--held)}
.q svg .mean{stroke:var(--warn);stroke-width:1.5;stroke-dasharray:4 3}
.log textarea{font-family:var(--font-mono)!important;font-size:12.5px!important}
.pixel img{image-rendering:pixelated}
.triples .grid-wrap{max-height:none!important;overflow:visible!important;height:auto!important}
.triples .grid-container{display:grid!important;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr))!important;
height:auto!important;
grid-template-rows:none!important;grid-auto-rows:auto!important;gap:14px!important}
.triples .thumbnail-item,.triples .thumbnail-lg{aspect-ratio:auto!important;height:auto!important;min-height:0}
.triples .thumbnail-item img{height:auto!important;object-fit:contain}
.triples .grid-container{padding-top:34px}
.triples .caption-label{position:static!important;display:block;max-width:none!important;padding:4px 8px;text-align:left}
button[aria-label="Remove this file"]{display:none}
@media (max-width:700px){
.gradio-container{padding:8px!important}
.tab-container button{padding:4px 7px!important;font-size:14px!important}
.q .tiles{grid-template-columns:1fr 1fr}.q .tile{padding:8px 10px}.q .tile b{font-size:17px}
.q .layer{grid-template-columns:1fr auto}.q .layer .path{grid-column:1/-1}
.q table:not(.heat) thead{display:none}
.q table:not(.heat),.q table:not(.heat) tbody,.q table:not(.heat) tr,.q table:not(.heat) td{display:block}
.q table:not(.heat) tr{padding:8px 0;border-bottom:1px solid var(--line)!important}
.q .scroll{max-width:calc(100vw - 100px)}
.q table:not(.heat) td,.q table:not(.heat) td.n{display:flex;gap:14px;justify-content:space-between;padding:2px 0;border:0!important;
text-align:right;white-space:normal}
.q table:not(.heat) td:empty{display:none}.q td.n+td:not(.n){padding-left:0}
.q table:not(.heat) td::before{content:attr(data-label);flex:none;color:var(--soft);text-align:left}
.q .heat th[scope=row]{max-width:128px;white-space:normal;overflow-wrap:anywhere;font-size:11.5px;line-height:1.25}
.q .heat thead th:first-child{white-space:normal}
}
"""
