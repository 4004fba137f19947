"""Fresh weights at the widths that another run ended with: whether its widths are good, apart from its weights.

As the method of an arm: method = "benchmarks/given_widths.py:train_again", before = true,
options = { plan = "RUN/plan.json" }.
"""

import torch
from torch import nn

from secateur import Budget, Plan, analyze
from secateur.graph import Inputs
from secateur.methods.precrop.reset import reset_
from secateur.surgery.cut import cut_copy


def train_again(model: nn.Module, inputs: Inputs, budget: Budget, *, plan: str) -> nn.Module:
    """The model cut by a saved plan, with weights drawn for the widths that it has then, by the run's seed.

    Args:
        model, inputs: as the plan was made for.
        budget: the one that the plan was made for; only the plan counts.
        plan: file of the plan.
    """
    return reset_(cut_copy(model, analyze(model, inputs), Plan.load(plan)), seed=torch.initial_seed())
