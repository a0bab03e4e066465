"""Style of the page. It needs no font or script of another host."""

from __future__ import annotations

CSS = """
.gradio-container { max-width: 1320px !important; margin: 0 auto !important; }
#pk-title h1 { margin: 0; font-size: 1.55rem; }
#pk-title p { margin: 0; color: var(--body-text-color-subdued); }
.pk-note, .pk-good, .pk-error { font-size: .875rem; padding: .45rem .7rem; border-radius: 8px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.pk-note { background: var(--background-fill-secondary); color: var(--body-text-color-subdued); }
.pk-good { background: rgba(22, 163, 74, .12); color: #15803d; }
.pk-error { background: rgba(220, 38, 38, .10); color: #b91c1c; border-left: 3px solid #dc2626; }
.dark .pk-good { color: #4ade80; }
.dark .pk-error { color: #fca5a5; }
.pk-invalid input, .pk-invalid textarea { box-shadow: 0 0 0 1.5px #dc2626 !important; }
.pk-progress { padding: .3rem 0; }
.pk-progress p { margin: .4rem 0 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
.pk-bar { height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden; }
.pk-bar div { height: 100%; border-radius: 4px; background: var(--color-accent); transition: width .4s; }
.pk-moving div { width: 30%; animation: pk-move 1.4s ease-in-out infinite alternate; }
@keyframes pk-move { from { margin-left: 0; } to { margin-left: 70%; } }
.pk-settings { display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); gap: .5rem; margin: 0; }
.pk-settings div { background: var(--background-fill-secondary); border-radius: 8px; padding: .4rem .7rem; }
.pk-settings div:last-child { grid-column: 1 / -1; }
.pk-settings dt { font-size: .72rem; color: var(--body-text-color-subdued); }
.pk-settings dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.pk-settings div:last-child dd { font-weight: 400; }
#pk-gallery .grid-container { grid-auto-rows: auto; padding-top: 2.2rem; }
#pk-gallery .thumbnail-item { aspect-ratio: 16 / 10; height: auto; }
#pk-gallery .thumbnail-item video { object-fit: contain; }
#pk-gallery .caption-label { font-size: .72rem; white-space: nowrap; }
.pk-field { gap: 4px !important; }
"""
FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]
MONO_FONTS = ["ui-monospace", "monospace"]
