"""From a row to what other programs open: what made it, and its student in the forms of servers.

`row` finds a row and its files, `details` says what made it. `student` exports its student:
`stored` reads the weights as a plain architecture names them; `plain_form`, `compressed_form` and
`gguf_form` (with `gguf_tokenizer`) write them; `reopened` opens the result in a fresh process,
`rescoring` scores it again, and `written` says what changed. `hub` writes a folder for the Hub and
uploads it.
"""

__all__ = [
    "compressed_form",
    "details",
    "gguf_form",
    "gguf_tokenizer",
    "hub",
    "plain_form",
    "reopened",
    "rescoring",
    "row",
    "stored",
    "student",
    "written",
]
