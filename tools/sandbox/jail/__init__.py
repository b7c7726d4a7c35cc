"""What runs inside the jail: the fork server, and the interpreters that it forks.

Only this folder is visible there, at the same dotted name, and only the standard library may be
imported. Nothing here can be trusted by the host once a program has run.
"""
