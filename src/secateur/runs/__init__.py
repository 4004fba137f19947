"""Runs: from names and numbers to a folder that holds the result and its proof.

config = PruneConfig(task=Task(model="resnet20", data="digits"), train=TrainConfig(epochs=10), budget={"macs": 0.5})
report = prune_run(config, "runs/first")        # runs/first/report.html, model.safetensors, model.onnx, …

`config` holds these classes, `pipeline` the functions that carry a run through.
"""
