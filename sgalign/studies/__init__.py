"""Studies: comparisons of training runs, from a file that describes them to the tables of their results.

A study goes through these modules in order:

1. `study` reads the file of a study, whose arms are configs of `sgalign fit` with overrides.
2. `plan` resolves each arm with each seed to a run, which has a folder of its own.
3. `launch` and `cluster` start the runs, `claims` keeps two processes from doing the same run, and `progress` shows
   how far they are.
4. `execute` does one run: fit, then test. `recording` has the callback that writes the result.
5. `results` reads the results. `intervals`, `tables`, `figures` and `page` make the report.
"""
