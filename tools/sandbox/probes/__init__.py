"""The attacks that a sandbox makes on itself before anybody may use it.

`attacks` holds the programs as data, `probe` runs them and looks at the session from outside.
"""
