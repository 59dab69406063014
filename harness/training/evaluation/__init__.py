"""Held-out data: `held_out` evaluates during a run and leaves no trace in it, the rest a checkpoint by
itself.

A checkpoint is evaluated on each example alone (`examples`), by the answers that it gives to chats
(`answers`, made by `generate`), or on tasks of EleutherAI's lm-eval (`lm_eval_tasks`).
"""
