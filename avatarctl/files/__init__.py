"""Bytes of weight files: formats read and written, folders, stored tensors. Nothing is interpreted."""
