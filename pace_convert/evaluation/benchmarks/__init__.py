"""The benchmarks, a module each, and the table of them."""
