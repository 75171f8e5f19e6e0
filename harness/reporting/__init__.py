"""Every table, picture and page of a set of records. Equal records give equal bytes. No torch.

`report.build_sections` makes sections of tables from records and `formats.write_sections` writes
them. `quality`, `costs`, `distances` and `claims` build the tables from the parts in `table`, and
`notes` the sentences below them. `glossary` explains the columns; `plots` and `html_page` draw.
"""

__all__ = [
    "claims",
    "costs",
    "distances",
    "formats",
    "frame",
    "glossary",
    "html_page",
    "measured",
    "notes",
    "plots",
    "quality",
    "recommendation",
    "report",
    "scores",
    "table",
]
