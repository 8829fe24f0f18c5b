"""Policies: scores -> selection, one file each."""
