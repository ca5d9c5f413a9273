"""Reading and writing weights and checkpoints, without running code from a file."""
