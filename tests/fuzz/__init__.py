"""Fuzzing of everything that reads bytes which others may have written: headers, residency logs, configurations.

targets.py: what is fed and what must hold. seeds.py: writes the seed corpus. mutate.py: a mutator without coverage.
run.py: the long run, `make fuzz`. test_fuzz.py: the short one, with the other tests.

An input that broke something goes into corpus/<target>/ under a name that says what it was.
"""
