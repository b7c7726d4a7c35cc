"""From tasks to trajectories."""
