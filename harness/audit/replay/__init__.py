"""What a replay is held against; the steps themselves are executed by `harness.training`.

In the order of a replay: `segment` (which steps, and what was signed about them), `divergence` (where their
digests part), `noise_floor` (how far honest executions end apart), `verdict` (what the replay came to).
"""
