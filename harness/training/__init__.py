"""The training half: launch, loop, resume. Needs torch.

Begin at `loop`, which is a run read from top to bottom. What it calls, each package using only those before
it:

- `telemetry`: what a launch says while it runs: metrics.jsonl, events, the screen, energy
- `ranks`: the processes of a launch: how they join, what they tell each other, who is lost
- `evaluation`: held-out data, during a run and of a checkpoint
- `elastic` and `step`: one update on one rank (`step.session`), and its sums where any world size must give
  the same bits
- `statement`: what a checkpoint's statement says
- `beginning`: what a launch continues from, or begins with
- `replay` and `doctor`: steps executed again, and what is looked at before a run

Beside the loop: `startup` makes what surrounds the steps, `desk` has the files of the run open, `recorder`
writes down what happened, `summary` puts a launch into words. `optimizer`, `schedule` and `seeding` are what
every update rests on; `plan` says what a run will need.
"""
