"""What is learned: `task` is the seam, `build` makes the task of a config. Built in are `language`, also
on `chat`, and `digits`."""
