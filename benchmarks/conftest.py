"""What runs in other environments is not collected here: it imports what ours does not have."""

collect_ignore = ["peers/jax_networks.py", "peers/neural_tangents_worker.py"]
