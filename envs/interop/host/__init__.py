"""Code that runs in the other library's interpreter; it imports nothing from tir_alp."""
