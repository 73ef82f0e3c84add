"""The shell: `modernbert-lite`, or `python -m modernbert_lite`."""

from .commands import main as main
