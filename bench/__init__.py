"""Speed, as ratios: each figure against a reference measured in the same run on the same machine.

Absolute numbers of a shared machine mean little; a ratio of two servers that took turns means
something. `python -m bench --help` says what is measured. Speed is never a test: nothing here
fails because something is slow.
"""
