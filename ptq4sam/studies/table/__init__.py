"""The published table beside one's own figures.

`published` has the figures of papers, `cells` reads what is to be run, `rows` what a cell is
and what became of it, `render` shows rows on a terminal, in Markdown, CSV and LaTeX.
"""
