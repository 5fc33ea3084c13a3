"""Networks with parameters, and how audio, images and text become tensors."""
