"""What is signed, and the rules that it must keep: what makes a checkpoint's story checkable by a stranger.

Begin at `checks`: the rules of a verification in the order in which they rest on each other. `verifier` holds
one checkpoint against them: `evidence` is what it is given of the folder, `signers` says whose signatures
count, `agreement` compares what is said more than once. `history` holds the checkpoints of a run against each
other and against its log, of whose entries `log_record` tells. They take bytes and statements, and give
`findings`. None touches a file; `harness.audit` does.

- `signing`: keys, and signatures by them
- `transparency`: the log of a run, who has seen its heads, and timestamps
- `policy`: who may sign what

Statements, each with a closed `schema`: `statements` (of a checkpoint), `later` (added to one), `exports`,
`corpora`. `seal` makes what lies in a folder that is about to be published, `lineage` draws the graph of what
came from what, `freshness` says how old the newest evidence is.
"""
