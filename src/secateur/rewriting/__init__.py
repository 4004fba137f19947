"""The forward pass as data: captured, compared with what a cut needs, and written anew where it must be."""
