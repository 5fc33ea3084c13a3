"""What sits where: weights that wait on the host and come to the device when they are needed."""
