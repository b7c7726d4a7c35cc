"""The sandbox over HTTP: server and client."""
