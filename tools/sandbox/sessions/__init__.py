"""The sandbox of this machine: its sessions, and where their interpreters come from.

`local_sandbox` admits and counts sessions, `session` runs cells with limits and typed outcomes,
`supply` keeps interpreters ready and replaces the hosts that make them.
"""
