"""Two checkpoints or runs, compared. Begin at `comparison`, whose result `text` tells.

`tensors` compares bytes and `ulp` measures how far they are apart; `facts` sorts what the statements say
differently.
"""
