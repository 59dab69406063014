"""The training half: launch, loop, resume. Needs torch."""
