"""Pictures (SVG, PNG and an HTML page) from the plain data that --json gives. May import base. Vega draws, by
vl-convert, and squarify lays out treemaps; only this room imports them.

A picture on a page is a `Figure`: a Vega-Lite spec, its words, and its data as a table. `page` puts figures into one
file, `save` writes them as SVG and PNG.
"""
