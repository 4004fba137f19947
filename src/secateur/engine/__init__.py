"""What methods share: the result, gates, how units leave, and the training session."""
