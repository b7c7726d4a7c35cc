"""A run whose roles are actors of a Ray cluster, each replaced when it dies or hangs.

`placement` starts the actors and `watched_actor` watches one of them. `engine_pool`,
`environment_pool` and `remote_trainer` are what the loop in `train` sees of them; the `*_host`
modules are what runs inside them. Ray is imported nowhere else.
"""
