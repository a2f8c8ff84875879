"""The policy network (transformer.py, rope.py), its logprobs (scoring.py), and its checkpoint folders (weights.py)."""
