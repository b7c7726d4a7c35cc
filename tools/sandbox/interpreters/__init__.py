"""Interpreters seen from the host: their hosts, their channels, their ends.

`interpreter` is one interpreter wherever it runs, and `host` is what makes them. There are two
kinds: `forked` with `fork_server_client` (processes of this machine), and `in_gvisor` with
`gvisor_client` (processes of a container with its own kernel). `fork_gate` permits forks,
`container_stream` and `descriptors` read what arrives.
"""
