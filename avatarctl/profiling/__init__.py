"""What a run will need, before it starts: the real code on tensors that have shapes and no numbers."""
