"""Inputs without parameters: sizes and fits, channel layouts, plans of chunks and of windows."""
