"""What runs in the other library's interpreter. Nothing here imports anything of ours."""
