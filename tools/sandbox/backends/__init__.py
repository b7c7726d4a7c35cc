"""What confines the fork server: one module per backend."""
