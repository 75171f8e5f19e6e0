"""Every table, picture and page of a set of records: the same records give the same bytes anywhere.
No torch.

`report.made_of` makes sections of records, `report.write_made` writes them; `quality`, `costs` and
`claims` make tables of the parts in `table`, `glossary` explains their columns, `plots` and
`html_page` draw.
"""

__all__ = [
    "claims",
    "costs",
    "formats",
    "frame",
    "glossary",
    "html_page",
    "measured",
    "notes",
    "plots",
    "quality",
    "report",
    "table",
]
