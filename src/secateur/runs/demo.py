"""The demonstration: everything in one minute, without any file."""

from secateur.recipes.train_config import TrainConfig
from secateur.runs.config import PruneConfig, Task


def demo_config(seed: int = 0) -> PruneConfig:
    """Train a ResNet on handwritten digits, prune it to half the MACs, and let it recover.

    The network has about as many MACs as ResNet-20, in fewer and wider layers. In those of ResNet-20, of 16 to 64
    channels, half of the MACs is less than a quarter of the time.

    >>> demo_config().budget["macs"]
    0.5
    """
    return PruneConfig(
        task=Task(model="resnet8_x2_b", data="digits", seed=seed),
        train=TrainConfig(epochs=10, batch_size=64, lr=0.1, schedule="one-cycle"),
        method="auto",
        budget={"macs": 0.5},
        finetune=TrainConfig.finetune(5, batch_size=64, lr=0.025),
    )
