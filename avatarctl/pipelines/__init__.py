"""Jobs from inputs to files: checked and planned, then made."""
