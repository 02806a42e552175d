"""The training step and what surrounds it: engine, schedules, ranks, checkpoints, logs."""
