"""What a model can call. Imports neither the trainer nor the environments."""
