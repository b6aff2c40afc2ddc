"""The published table beside one's own figures.

`published` has the figures of papers, `rows` what a cell of the table is and what became of it,
`render` shows rows on a terminal, in Markdown, CSV and LaTeX.
"""
