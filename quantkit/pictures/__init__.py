"""Pictures (SVG, PNG and a page of HTML) from the plain data that --json gives. May import base. Vega draws, by
vl-convert, and squarify places the rectangles of a treemap; they are imported only here.

A picture of a page is a `Figure`: what Vega-Lite is to draw, its words, and its data as a table. `page` puts figures
into one file, `save` writes them as SVG and PNG.
"""
