"""The demonstration: everything in one minute, without any file."""

from secateur.recipes.train_config import TrainConfig
from secateur.runs.config import PruneConfig, Task


def demo_config(seed: int = 0) -> PruneConfig:
    """Train ResNet-20 on handwritten digits, prune it to half the MACs, and let it recover.

    >>> demo_config().budget["macs"]
    0.5
    """
    return PruneConfig(
        task=Task(model="resnet20", data="digits", seed=seed),
        train=TrainConfig(epochs=10, batch_size=64, lr=0.1, schedule="one-cycle"),
        method="auto",
        budget={"macs": 0.5},
        finetune=TrainConfig.finetune(5, batch_size=64, lr=0.025),
    )
