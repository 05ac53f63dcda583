"""The one train loop and what it stands on: step and optimizer, schedules, checkpoints, the run folder and its lock,
processes and signals, metrics and who is told them. What a stage brings it does not know."""
