"""Answers as values: find a completion's answer, read it, compare it with the right one.

    extract.py        finds the answer in a completion's text
    math/             reads answers as mathematics and compares their values
    countdown.py      checks an expression against its numbers and its target
    program_names.py  finds the names in a problem's tests that the program must define
    votes.py          groups the sampled answers of one problem by equality
    ground_truth.py   chooses a problem's verifier, and checks that it can read the right answer
    verdict.py        `Verdict`: right, wrong or ungradable

Standard library and mpmath only: verifier workers import this package and must start fast.
"""
