"""What is made of verified folders for other tools; nothing is written that does not verify.

`export` makes a Hugging Face folder of a checkpoint, under the names that `hugging_face` knows; `croissant`
describes a corpus for catalogues.
"""
