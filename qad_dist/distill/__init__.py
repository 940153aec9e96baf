"""Training by distillation: loss, optimizer, step, loop, checkpoint. Knows batches and callables, not speech."""
