"""What this machine has, and how much of it a sandbox uses."""
