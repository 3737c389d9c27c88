"""What a run asks of its Trainer: settings, logging at a step, the other processes, orderly endings, checkpoints."""
