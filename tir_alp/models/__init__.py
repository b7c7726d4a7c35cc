"""Models that need no download at run time."""
