"""What runs inside the jail: the fork server, and the interpreters that it forks.

Only this folder is visible there, under the same dotted name, and only the standard library may be
imported. The host trusts nothing here once a program has run.

`fork_server` makes sessions and `cells` executes their code. `room_*` prepare where a session
lives, `confine` takes its rights away. `container_entry` and `gvisor_relay` start all this in a
container. `frames`, `seal` and `credentials` are how the jail talks to the host; the rest wraps
what the kernel offers.
"""
