"""Training data: where samples are, how videos become samples, and what is made of them once."""
