"""Networks with parameters, how they are loaded, and how audio, images and text become tensors."""
