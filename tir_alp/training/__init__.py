"""What updates the weights."""
