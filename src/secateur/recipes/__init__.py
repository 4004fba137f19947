"""What experiments are made of: built-in models, data sets, the training loop, named experiments."""
