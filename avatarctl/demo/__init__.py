"""What the toolkit brings along so that its commands work before the user has given anything."""
