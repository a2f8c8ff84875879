"""Runs programs that may be hostile: they can do no harm, and they cannot see or change their tests.

    run.py          runs one program against its tests in two jails -> `Outcome`
    sandbox.py      which mechanisms hold on this machine; starts and ends one jail
    jail.py         the child process that locks itself in; syscalls.py has the kernel calls it needs
    candidate.py    in one jail: executes the program
    examiner.py     in the other jail: executes the tests and calls the program over a channel
    wire.py         the channel's format: plain values as JSON
    trial.py        a hostile program that a jail must withstand before anything else runs in it

Independent of the trainer: it imports nothing else of this repository, and takes and returns plain values.
"""
