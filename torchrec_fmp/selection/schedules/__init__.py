"""Schedules: one prune, or several with training in between, one file each."""
