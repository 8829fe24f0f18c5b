"""Moves tables and their fused optimizer state from one sharding plan to another."""
