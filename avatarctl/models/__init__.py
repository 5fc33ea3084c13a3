"""Networks with parameters, how they are loaded, and how sound, pictures and text become tensors."""
