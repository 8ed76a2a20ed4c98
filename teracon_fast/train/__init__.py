"""Training a sequence of tasks: the loop, the run folder, checkpoints, the log, evaluation."""
