"""Plans: TorchRec's planner, its estimates and costs, and planning again after a prune."""
