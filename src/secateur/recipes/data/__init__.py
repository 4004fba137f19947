"""Image classification data: data sets in memory or in files, and batches that any run can reproduce."""

from secateur.recipes.data.batches import AUGMENTATIONS, Batches
from secateur.recipes.data.dataset import Dataset, Split
from secateur.recipes.data.load import list_data, load_data
from secateur.recipes.normalisation import Normalisation

__all__ = ["AUGMENTATIONS", "Batches", "Dataset", "Normalisation", "Split", "list_data", "load_data"]
