"""One signed folder, examined. Begin at `opening`: a checkpoint, all but its payload's bytes.

`payload` hashes those. `exported` examines an export and `prepared` a corpus, which share `sealed`. `story`
reads a checkpoint's statement for verbs that show, with a policy or without.
"""
