"""The policy network (transformer.py), its logprobs (scoring.py), its checkpoint folders (weights.py)."""
