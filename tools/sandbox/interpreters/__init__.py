"""One interpreter in a jail, from the outside."""
