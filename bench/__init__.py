"""What is timed, and how: `python -m bench.<name>`. Truth lives in tests/, timing here, results in bench/results/."""
