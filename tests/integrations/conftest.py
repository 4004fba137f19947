"""Which files hold tests: the others import a framework, which may be missing."""

collect_ignore = ["huggingface_run.py", "lightning_run.py", "two_processes.py", "ultralytics_run.py"]
