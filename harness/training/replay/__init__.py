"""Steps of a run, executed again; what they are held against is `harness.audit.replay`.

`execution` is the program that `harness replay` starts, one process a rank; `localise` finds the operator
that does not repeat its bits. `perturbed` is the program behind ``--floor``, `distance` how far its
executions ended apart.
"""
