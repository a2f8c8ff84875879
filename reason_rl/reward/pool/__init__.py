"""The verifier service: worker processes that may hang, crash or be killed, while the trainer continues.

    service.py    in the trainer: queues, threads, restarts
    handle.py     in the trainer: one worker process
    worker.py     in the worker: its main loop
"""
