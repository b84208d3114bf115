"""Benchmarks of fastrl against plain torch and other libraries: `python -m bench --help`."""
