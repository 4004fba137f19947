"""Methods × budgets × seeds on one model and one data set, with the same training for all.

outcomes = compare(Comparison.read("recipe.toml"), "runs/compare")        # runs/compare/index.html, table.md, table.csv

Data flows one way: a recipe (`recipe`, `schedule`) gives cells (`cells`), which processes run (`pool`); their outcomes
(`results`) give means and differences (`statistics`), advice, tables and the page.
"""

from secateur.compare.cells import Cell, list_cells
from secateur.compare.recipe import Arm, Comparison
from secateur.compare.results import Outcome
from secateur.compare.run import compare, run_only
from secateur.compare.schedule import SCHEDULES

__all__ = ["SCHEDULES", "Arm", "Cell", "Comparison", "Outcome", "compare", "list_cells", "run_only"]
