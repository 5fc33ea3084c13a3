"""A run's files to networks: which files, what they are together, and filling networks with them."""
