"""Published weights: where they lie on this disk, how they are fetched and checked."""
