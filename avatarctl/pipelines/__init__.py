"""Jobs from inputs to files: condition, sample, decode, stream."""
