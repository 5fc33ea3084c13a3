"""From noise to latents: guidance and the loops over a family."""
