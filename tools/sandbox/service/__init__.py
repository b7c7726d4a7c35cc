"""The sandbox over HTTP: server and client.

`server` offers sessions and single programs, `client` is backend `remote`. `script` runs a whole
program, `files` moves files in and out of a session, `compat` speaks the formats of two older
services, `metrics` counts.
"""
