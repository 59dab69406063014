"""What is learned: the task seam, and the two built-in tasks."""
