"""What this machine has, and how much of it a sandbox uses.

`capacity` finds what is free when a sandbox starts, `budget` shares it out among sessions, `usage`
measures processes and containers, `control_groups` reads the groups around a process.
"""
