"""Weight files: names, and later reading and writing. A family's key map comes as an argument."""
