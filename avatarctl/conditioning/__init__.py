"""Inputs without parameters: channel layouts, geometry, chunk plans, feature windows."""
