"""Measures a checkpoint: `python -m reason_rl.eval`.

    __main__.py   the command: options, sampling and grading, the table
    plan.py       resolves the options and checks them before weights are read
    folder.py     the result files, and how an interrupted evaluation continues
    metrics.py    from graded groups to rows, from rows to pass@k, cons@k and their intervals
"""
