"""Which units matter: pure functions from a group's tensors to one number per unit."""

from secateur.scores.table import SCORES, Score, Slice, score_groups, score_named

__all__ = ["SCORES", "Score", "Slice", "score_groups", "score_named"]
