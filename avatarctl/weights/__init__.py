"""What a weight file means: names, sizes, adapters; merging, extracting, converting, describing."""
