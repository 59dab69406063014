"""One signed folder, examined. Begin at `opening`: a checkpoint, all but its payload's bytes.

`file_set` compares what files there are, `payload` hashes them. `exported` examines an export and `prepared`
a corpus, which share `sealed`. `story` reads a checkpoint's statement for verbs that show, with a policy or
without.
"""
