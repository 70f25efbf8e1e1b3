"""Who runs the step: one process, DDP and, in time, sharded engines."""
