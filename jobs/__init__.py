"""The jobs: `python -m jobs.<name>`, one page each."""
