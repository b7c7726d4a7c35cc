"""The backends: how a jail is planned and a fork server is started in it.

One module per backend: `namespaces`, `landlock` (and `unsafe`), `docker`; `gvisor` is backend
`docker` with a kernel per session. All implement `jail_protocol`. `seccomp` compiles the filter of
a session, `container_profile` writes that of a container, `launcher` is a script that gives up
root, and `container_engine` talks to Docker or Podman.
"""
