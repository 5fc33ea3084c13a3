"""How the built-in models are made: every network of the cartoon world, from seeds alone."""
