"""Rate-distortion pruning: budgets shared out by measured distortion curves."""
