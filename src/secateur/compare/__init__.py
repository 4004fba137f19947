"""Methods × budgets × seeds on one model and one data set, with the same training for all.

comparison = Comparison.read("recipe.toml")
outcomes = compare(comparison, "runs/compare")        # runs/compare/index.html, table.md, table.csv

Data flows one way: a recipe (`recipe`, `schedule`) gives cells (`cells`), which processes run (`pool`); their outcomes
(`results`) give means and differences (`statistics`), advice, tables and the page. `run` has `compare`, which does all
of it.
"""
