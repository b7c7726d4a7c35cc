"""Sessions of the local sandbox, and where their interpreters come from."""
