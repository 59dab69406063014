"""The graph of what came from what, for a person. Begin at `picture`, which reads it from a folder.

`text` is the form for a terminal, and Mermaid. `html` is the page: its drawing is `svg`, what a click opens
`cards`. Both forms share `rows` (where a node goes) and `words`; `fold` draws long stretches as one node. The
graph itself is `harness.provenance.lineage`.
"""
