"""Talk to a checkpoint: `python -m reason_rl.serve.cli CHECKPOINT ["prompt"]`."""
