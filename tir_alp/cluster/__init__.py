"""A run whose parts are actors of a Ray cluster, each replaced when it dies or hangs.

`cluster` places them; `part` watches one of them; `engine_pool`, `environments` and `trainer` are
what the loop in `train` sees of them, and `*_host` what lives in the actors. Ray is imported
nowhere else.
"""
