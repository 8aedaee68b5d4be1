"""Training: the loop (run.py), what it trains (tokenizer_task.py) and their arguments. Needs the extra `train`."""
