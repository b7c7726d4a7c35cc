"""Opens, supervises and ends a run."""
