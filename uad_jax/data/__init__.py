"""From NIfTI files to batches: numpy and Grain, no Linen (floor 2)."""
