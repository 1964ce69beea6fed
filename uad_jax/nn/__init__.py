"""Linen modules: no loss, no optimiser, no input or output (floor 2)."""
