"""Studies of the trainer itself: `compare`, `mismatch`, `drill`, `simulate`."""
