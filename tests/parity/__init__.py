"""Comparison of the product with numbers recorded from published implementations; see README.md."""
