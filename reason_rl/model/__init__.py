"""The policy: transformer.py is the network, rope.py its angles, weights.py its files on disk."""
