"""One GRPO step of a checkpoint as a page with all its numbers: `python -m reason_rl.explain CHECKPOINT`.

    step.py       runs the stage's own step, and records it
    by_hand.py    advantages and the loss's terms in float64, from the formulas
    page.py       the record as one HTML file
"""
