"""Training: the objective of a step, what is trained, checkpoints, and the loop over all of it."""
