"""What a model can call. Imports nothing of the trainer and nothing of the environments."""
